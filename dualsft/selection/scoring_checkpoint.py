"""The scoring checkpoint θ, made by a warm-up or given ready-made, and Adam's second moment ĉ there."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from dualsft.data.module import InstructionDataModule
from dualsft.errors import UserError, advising
from dualsft.models import PreTrainedModel
from dualsft.models.lazy import LazyTensors, named_under, under
from dualsft.models.loading import model_fingerprint, model_folder
from dualsft.models.tensor_file import OpenTensors, check_tensors
from dualsft.runs.folder import RunFolder
from dualsft.runs.phase_keeper import PhaseKeeper
from dualsft.runs.progress import PhaseLog
from dualsft.selection.combined_objective import is_combined
from dualsft.selection.directions import trainable_parameters
from dualsft.selection.settings import SelectionSettings
from dualsft.selection.warmup import ADVICE, warm_up
from dualsft.sharding.collectives import on_rank_zero
from dualsft.sharding.groups import world_size
from dualsft.sharding.local_batch import rows_to_read
from dualsft.sharding.save import save_sharded, write_shards
from dualsft.sharding.shard_model import is_sharded
from dualsft.sharding.shards import local_shard, shard_of
from dualsft.storage.writing import sync_folder, sync_tree, writing_to

SECOND_MOMENT = "second_moment.safetensors"
Moments = Mapping[str, Tensor]
"""Parameter name -> ĉ, the bias-corrected second moment; of a sharded model this rank's shard. Read at every use."""

_PHASE, _MOMENTS, _KEPT = "warm-up", "warm-up-moments", "warmup"
_MOMENT = 4
"""Bytes of an entry of ĉ."""


def reach_scoring_checkpoint(
    model: PreTrainedModel,
    settings: SelectionSettings,
    data: InstructionDataModule,
    run: RunFolder,
    log: PhaseLog,
    seed: int,
) -> Moments:
    """Bring the model to θ, unless θ was loaded, and return ĉ where it is needed and known.

    Raises:
        UserError: if the warm-up's loss stops being finite, memory runs out, or a ready checkpoint has no usable ĉ.
    """
    warmup = settings.warmup
    if warmup.checkpoint is not None:
        return stored_second_moment(warmup.checkpoint, model) if settings.needs_second_moment_of_warmup else {}
    if warmup.fraction == 0:
        return {}
    keeper = PhaseKeeper(run, _PHASE, settings.save_minutes)
    keeps_moments = settings.needs_second_moment_of_warmup or warmup.keep
    if (saved := _finished(run, keeps_moments and not is_combined(run))) is None:
        _warm_up(model, settings, data, run, log, seed, keeper, keeps_moments)
    else:
        for name, parameter in model.named_parameters():
            local_shard(parameter.detach()).copy_(saved[0][f"weight:{name}"])
        log.restore(saved[1])
    keeper.drop()
    kept = run.load(_MOMENTS)
    moments = under("moment", kept[0]) if kept else {}  # read from their file at every use
    if warmup.keep:
        _keep_checkpoint(model, moments, data, run)
    return moments


def _warm_up(
    model: PreTrainedModel,
    settings: SelectionSettings,
    data: InstructionDataModule,
    run: RunFolder,
    log: PhaseLog,
    seed: int,
    keeper: PhaseKeeper,
    keeps_moments: bool,
) -> None:
    """Bring the model to θ by a warm-up, and save θ and, where it is wanted, ĉ."""
    warmup = settings.warmup
    on_rank_zero(lambda: shutil.rmtree(run.path / _KEPT, ignore_errors=True))  # of a state that was dropped
    ids = warmup.draw(data.train_examples.ok_ids(), seed)
    loader = data.training_loader(ids, seed, part=rows_to_read())
    with (
        advising("in the warm-up", ADVICE),
        log.phase(_PHASE, len(ids) * warmup.epochs, keeper.earlier, dealt=False) as keeper.meter,
    ):
        moments = warm_up(
            model,
            loader,
            warmup.epochs,
            warmup.learning_rate,
            keeper.meter,
            keeper,
            seed,
            settings.offload_optimizer,
        )
    weights = {f"weight:{name}": local_shard(p.detach()) for name, p in model.named_parameters()}
    run.make_room(sum(w.numel() * (w.element_size() + _MOMENT) for w in weights.values()), [keeper.name])
    if keeps_moments:  # apart from the weights, which are used for longer
        run.save(_MOMENTS, named_under("moment", moments), {})
    del moments
    run.save(_PHASE, weights, log.latest())


def _finished(run: RunFolder, needs_moments: bool) -> tuple[Mapping[str, Tensor], dict[str, Any]] | None:
    """The state of a warm-up that an earlier run finished; dropped where the second moment beside it is missing."""
    saved, moments = run.load(_PHASE), run.load(_MOMENTS)
    if saved is not None and moments is None and needs_moments:
        run.drop(_PHASE)
        return None
    return saved


def drop_second_moment(run: RunFolder) -> None:
    """Drop ĉ of the warm-up from the run's files, where what was made of it is all that is used."""
    run.drop(_MOMENTS)


def warmup_steps(settings: SelectionSettings, data: InstructionDataModule, seed: int) -> int | None:
    """How many optimizer steps `reach_scoring_checkpoint` takes; None where there is no warm-up."""
    warmup = settings.warmup
    along_pool = settings.path.along is not None and settings.path_rule.trains_on != "target"
    if warmup.checkpoint is not None or warmup.fraction == 0 or along_pool:
        return None
    return len(data.training_loader(warmup.draw(data.train_examples.ok_ids(), seed), seed)) * warmup.epochs


def _keep_checkpoint(model: PreTrainedModel, moments: Moments, data: InstructionDataModule, run: RunFolder) -> None:
    """Write θ, ĉ and the tokenizer to ``warmup/``, unless an earlier run has."""
    folder = run.path / _KEPT
    if on_rank_zero(folder.exists):  # complete, as it was moved here in one step
        return
    staged = run.staging()
    if is_sharded(model) or world_size() > 1:
        save_sharded(model, staged)
    else:
        with writing_to(folder):
            model.save_pretrained(staged)
    write_shards(moments, dict(model.named_parameters()), staged / SECOND_MOMENT)

    def publish() -> None:
        with writing_to(folder):
            data.tokenizer.save_pretrained(staged)
            sync_tree(staged)
            staged.replace(folder)
            sync_folder(folder.parent)

    on_rank_zero(publish)


def second_moment_file(checkpoint: str) -> Path:
    """Find the file of ĉ in a ready scoring checkpoint; refuse one without."""
    path = model_folder(checkpoint) / SECOND_MOMENT
    if not path.is_file():
        raise UserError(
            f"The preconditioner adam and the scorer diagonal_fisher need a second moment, but {checkpoint} has no "
            f"{SECOND_MOMENT}; make the checkpoint with model.warmup.keep, set model.preconditioner to none, or take "
            "diagonal_fisher's source empirical_fisher."
        )
    return path


def stored_second_moment(checkpoint: str, model: PreTrainedModel) -> Moments:
    """Open ĉ of a ready scoring checkpoint; each tensor is read to the host at every use."""
    path = second_moment_file(checkpoint)
    weights = trainable_parameters(model)
    try:
        check_tensors(path)
        moments = OpenTensors(path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); make the scoring checkpoint again.") from error
    if {n: spec.shape for n, spec in moments.specs.items()} != {n: tuple(w.shape) for n, w in weights.items()}:
        raise UserError(f"{path} belongs to another model: its parameters are not those of {checkpoint}.")
    return LazyTensors(moments, lambda name: shard_of(moments[name], weights[name]))


def describe_checkpoint(checkpoint: str) -> dict[str, str | None]:
    """Fingerprint a ready scoring checkpoint: SHA-256 of its weights and of its second moment's file, if any."""
    path, digest = model_folder(checkpoint) / SECOND_MOMENT, None
    if path.is_file():
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"fingerprint": model_fingerprint(checkpoint), "second_moment": digest}
