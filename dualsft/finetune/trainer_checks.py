"""Checks of the trainer of a masked fine-tune, before anything is loaded or trained."""

from collections.abc import Sequence

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateMonitor, ModelPruning
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.optim import Optimizer

from dualsft.errors import UserError
from dualsft.sharding.strategy import RANKS

_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
_PRECISIONS_ON_RANKS = _PRECISIONS[:2]  # ranks would not agree on how to scale the loss
_METRICS = ("loss", "perplexity", "token_accuracy")


def check_trainer(trainer: Trainer) -> None:
    """Refuse a trainer that this fine-tune cannot run under.

    Its precision would convert the masters, it has several processes that do not add up their gradients, it trains on
    nothing, or a callback would choose other weights or mix them up.
    """
    precisions = _PRECISIONS_ON_RANKS if isinstance(trainer.strategy, RANKS) else _PRECISIONS
    if trainer.precision not in precisions:
        raise UserError(
            f"trainer.precision is {trainer.precision}, which would convert the trained weights' float32 copies too; "
            f"give one of {', '.join(precisions)}, and set the weights' type with model.dtype."
        )
    _check_numbers(trainer)
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, *RANKS)):
        raise UserError(
            f"fit cannot run on {trainer.world_size} processes under {type(trainer.strategy).__name__}; set "
            "trainer.strategy to ddp, which holds the whole model on each, to fsdp2 or hsdp, which shard it, or "
            "trainer.devices to 1."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        _check_callback(callback)


def _check_numbers(trainer: Trainer) -> None:
    if trainer.accumulate_grad_batches < 1:
        raise UserError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}; give at least 1 batch to a step."
        )
    if trainer.gradient_clip_val is not None and trainer.gradient_clip_val < 0:
        raise UserError(
            f"trainer.gradient_clip_val is {trainer.gradient_clip_val}, which would turn the gradients round; give a "
            "positive limit, or null for none."
        )
    if trainer.limit_train_batches == 0:
        raise UserError("trainer.limit_train_batches is 0, so there is nothing to train on; give at least 1.")
    if overfit := trainer.overfit_batches:  # type: ignore[attr-defined]
        raise UserError(
            f"trainer.overfit_batches is {overfit}, which takes the data's batches apart; give "
            "trainer.limit_train_batches, or data.train and data.validation of a few rows."
        )


def check_clipping(trainer: Trainer, optimizer: Optimizer) -> None:
    """Refuse to clip gradients for a fused optimizer under mixed precision, which Lightning does not allow."""
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)  # what Lightning asks
    if fused and trainer.gradient_clip_val and isinstance(trainer.precision_plugin, MixedPrecision):
        raise UserError(
            f"trainer.gradient_clip_val is {trainer.gradient_clip_val}, but under trainer.precision "
            f"{trainer.precision} gradients cannot be clipped for a fused optimizer; set the optimizer's fused to "
            "false, or trainer.precision to 32-true with model.dtype bfloat16."
        )


def _check_callback(callback: Callback) -> None:
    kind = type(callback).__name__
    # Lightning's newer releases have WeightAveraging; with this setting it would pair the buffers of the module
    # with those of its copy, which holds the masters alone (`MaskedFinetuneModule.__deepcopy__`)
    if getattr(callback, "_use_buffers", True) is False:
        raise UserError(
            f"{kind} cannot work with use_buffers=false here; leave it at true: the trained weights alone are averaged "
            "either way."
        )
    if isinstance(callback, (BaseFinetuning, ModelPruning)):
        raise UserError(
            f"{kind} chooses itself which weights are trained or kept, which is the selection's to say; leave it out "
            "of trainer.callbacks, and give model.selection."
        )


def is_validated(trainer: Trainer) -> bool:
    """Whether a fit has anything to validate on."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return getattr(data, "validation", True) is not None and trainer.limit_val_batches != 0


def metric_names(trainer: Trainer, sets: Sequence[str | None], *, prior: bool) -> list[str]:
    """The metrics that a fit logs, given the names of its validation sets; a single source has none: [None]."""
    names = ["train_loss", *(["train_prior"] if prior else [])]
    for metric in _METRICS if is_validated(trainer) else ():
        names += [f"val_{metric}", *(f"val_{metric}/{name}" for name in sets if name is not None)]
    return names


def check_monitors(trainer: Trainer, known: Sequence[str]) -> None:
    """Refuse a callback that depends on a metric that is not logged: it would fail only after an epoch."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        check_monitor(trainer, f"{type(callback).__name__} in trainer.callbacks", callback, known)


def check_monitor(trainer: Trainer, where: str, part: object, known: Sequence[str]) -> None:
    """Refuse an object whose ``monitor``, if it has one, is neither a known metric nor may come from a callback."""
    monitor = getattr(part, "monitor", None)
    if monitor is None or monitor in (*known, "epoch", "step"):
        return
    if not any(map(_may_log, trainer.callbacks)):  # type: ignore[attr-defined]
        raise UserError(f"{where} monitors {monitor!r}, which is not logged; give one of {', '.join(known)}.")


def _may_log(callback: Callback) -> bool:
    """Whether a callback may log metrics: any but Lightning's own, and Lightning's LearningRateMonitor."""
    foreign = type(callback).__module__.split(".")[0] not in ("lightning", "dualsft")
    return foreign or isinstance(callback, LearningRateMonitor)
