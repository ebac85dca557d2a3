"""The phases that cost time: warm-up and validation gradient, which a killed run need not repeat, and the scores."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dualsft.data import InstructionDataModule
from dualsft.errors import UserError
from dualsft.gradients import GradientPass, gradient_pass
from dualsft.models import checkpoint_activations, model_fingerprint, model_folder
from dualsft.progress import PhaseLog
from dualsft.run_folder import RunFolder
from dualsft.scorers import ParameterStatistics, Scorer
from dualsft.selection.warmup import EPS, Warmup, warm_up

SECOND_MOMENT = "second_moment.safetensors"
Moments = dict[str, Tensor]
"""Parameter name -> ĉ, the bias-corrected second moment."""


class Phases:
    """The phases of one selection, over one model and one output folder.

    Args:
        model: The base model, or the scoring checkpoint that stands for a warm-up.
        data: The pool and the validation set.
        run: Keeps the state of finished phases.
        log: Keeps what each phase cost, and shows progress.
        seed: Decides which examples the warm-up draws, and their order.
    """

    def __init__(
        self, model: PreTrainedModel, data: InstructionDataModule, run: RunFolder, log: PhaseLog, seed: int
    ) -> None:
        self._model, self._data, self._run, self._log, self._seed = model, data, run, log, seed

    def warm_up(self, settings: Warmup) -> Moments:
        """Bring the model to the scoring checkpoint θ; its second moment, or nothing without a warm-up.

        Raises:
            UserError: if the warm-up's loss stops being finite.
        """
        if settings.fraction == 0:
            return {}
        if (saved := self._run.load("warm-up")) is None:
            self._warm_up(settings)
            saved = self._run.load("warm-up")
            assert saved is not None
        else:
            self._model.load_state_dict(_under("weight", saved[0]), strict=False)
        self._log.restore(saved[1])
        moments = {name: moment.to(self._model.device) for name, moment in _under("moment", saved[0]).items()}
        if settings.keep:
            self._keep_checkpoint(moments)
        return moments

    def _warm_up(self, settings: Warmup) -> None:
        ids = settings.draw(self._data.train_examples.ok_ids(), self._seed)
        loader = self._data.training_loader(ids, self._seed)
        with self._log.phase("warm-up", len(ids) * settings.epochs) as watch, _seeded(self._model, self._seed):
            moments = warm_up(self._model, loader, settings.epochs, settings.learning_rate, watch)
        weights = {f"weight:{name}": p for name, p in self._model.named_parameters()}
        moments = {f"moment:{name}": moment for name, moment in moments.items()}
        self._run.save("warm-up", {**weights, **moments}, self._log.take())

    def _keep_checkpoint(self, moments: Moments) -> None:
        folder = self._run.path / "warmup"
        self._model.save_pretrained(folder)
        self._data.tokenizer.save_pretrained(folder)
        save_file({name: moment.contiguous().cpu() for name, moment in moments.items()}, folder / SECOND_MOMENT)

    def validation_gradient(self, checkpointing: bool) -> dict[str, Tensor]:
        """v, the mean gradient over the validation examples, per parameter.

        Raises:
            UserError: if no validation example has a finite loss and gradient.
        """
        if (saved := self._run.load("validation-gradient")) is not None:
            self._log.restore(saved[1])
            return {name: value.to(self._model.device) for name, value in saved[0].items()}
        with (
            self._log.phase("validation gradient", len(self._data.validation_examples.ok_ids())) as watch,
            scoring_mode(self._model, checkpointing),
        ):
            found = gradient_pass(self._model, self._data.validation_loader(), watch)
        if not found.counted:
            raise UserError(
                "No validation example has a finite loss and gradient at the scoring checkpoint; check the data."
            )
        gradient = {name: total.div_(found.counted) for name, total in found.sums.items()}
        self._run.save("validation-gradient", gradient, notes := self._log.take())
        self._log.restore(notes)
        return gradient

    def scores(self, direction: dict[str, Tensor], pool: list[int], checkpointing: bool) -> GradientPass:
        """Rows and columns of the interaction matrix over the pool."""
        if (saved := self._run.load("scores")) is not None:
            self._log.restore(saved[1])
            sums = {name: total.to(self._model.device) for name, total in _under("sum", saved[0]).items()}
            rows = dict(zip(saved[1]["ids"], saved[0]["rows"].tolist(), strict=True))
            return GradientPass(sums, rows, len(rows), set(saved[1]["nonfinite"]), saved[1]["coverage"])
        with self._log.phase("scores", len(pool)) as watch, scoring_mode(self._model, checkpointing):
            found = gradient_pass(self._model, self._data.pool_loader(pool), watch, direction)
        notes = {
            **self._log.take(),
            "ids": list(found.rows),
            "nonfinite": sorted(found.nonfinite),
            "coverage": found.coverage,
        }
        rows_kept = torch.tensor(list(found.rows.values()), dtype=torch.float64)
        self._run.save("scores", {"rows": rows_kept, **{f"sum:{n}": t for n, t in found.sums.items()}}, notes)
        self._log.restore(notes)
        return found


@torch.no_grad()
def directions(
    model: nn.Module, scorer: Scorer, gradient: dict[str, Tensor], moments: Moments, step_size: float, num_examples: int
) -> dict[str, Tensor]:
    """U for every trainable parameter; each v and ĉ is dropped from its mapping as soon as it has been used.

    Args:
        model: The model at the scoring checkpoint.
        scorer: The rule for u.
        gradient: v per parameter.
        moments: ĉ per parameter for P = 1/(sqrt(ĉ)+eps); empty for P = 1.
        step_size: η.
        num_examples: n.

    Raises:
        UserError: if a direction is not finite, or not of its parameter's shape.
    """
    chosen = {}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        v = gradient.pop(name)
        p = moments.pop(name).sqrt_().add_(EPS).reciprocal_() if moments else torch.ones_like(v)
        u = scorer.direction(ParameterStatistics(name, weight, v, p, step_size, num_examples))
        if not isinstance(u, Tensor) or u.shape != weight.shape or not bool(u.isfinite().all()):
            raise UserError(f"{type(scorer).__name__} gave {name} a direction that is not finite or not of its shape.")
        chosen[name] = u
    return chosen


def second_moment_file(checkpoint: str) -> Path:
    """The file of ĉ beside a ready scoring checkpoint.

    Raises:
        UserError: if there is none.
    """
    path = model_folder(checkpoint) / SECOND_MOMENT
    if not path.is_file():
        raise UserError(
            f"model.preconditioner is adam, but {checkpoint} has no {SECOND_MOMENT}; make the checkpoint with "
            "model.warmup.keep, or set model.preconditioner to none."
        )
    return path


def stored_second_moment(checkpoint: str, model: nn.Module) -> Moments:
    """ĉ beside a ready scoring checkpoint.

    Raises:
        UserError: if there is none, it cannot be read, or it belongs to another model.
    """
    path = second_moment_file(checkpoint)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    try:
        moments = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if {n: m.shape for n, m in moments.items()} != {n: w.shape for n, w in weights.items()}:
        raise UserError(f"{path} belongs to another model: its parameters are not those of {checkpoint}.")
    return {name: moment.to(weights[name].device) for name, moment in moments.items()}


def describe_checkpoint(checkpoint: str) -> dict[str, str | None]:
    """Fingerprints of a ready scoring checkpoint: SHA-256 of its weights and of its second moment's file, if any."""
    path, digest = model_folder(checkpoint) / SECOND_MOMENT, None
    if path.is_file():
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"fingerprint": model_fingerprint(checkpoint), "second_moment": digest}


@contextmanager
def scoring_mode(model: PreTrainedModel, checkpointing: bool) -> Iterator[None]:
    """Evaluation mode, in which activation checkpointing works all the same.

    A layer asks its ``training`` flag whether to checkpoint, and may ask the same flag whether to drop out: the flag is
    up for the first question alone.
    """
    model.eval()
    if not checkpointing:
        yield
        return
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return _training(layers, False, then=True), _training(layers, False, then=True)

    checkpoint_activations(model, context_fn=contexts)
    try:
        with _training(layers, True, then=False):
            yield
    finally:
        checkpoint_activations(model)


@contextmanager
def _training(layers: Sequence[nn.Module], flag: bool, then: bool) -> Iterator[None]:
    for layer in layers:
        layer.training = flag
    try:
        yield
    finally:
        for layer in layers:
            layer.training = then


@contextmanager
def _seeded(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Dropout by this seed, whatever has drawn random numbers before."""
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(f"{prefix}:"): t for n, t in tensors.items() if n.startswith(f"{prefix}:")}
