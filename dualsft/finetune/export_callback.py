"""Export at the end of a fit: an ordinary Hugging Face checkpoint with its model card, and the delta."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from dualsft.errors import UserError
from dualsft.export.checkpoints import copy_companions, save_weights
from dualsft.export.delta import Changes, dtype_name, find_changes, sharded_changes, write_delta
from dualsft.export.model_card import write_card
from dualsft.export.provenance import describe_base, describe_selection, describe_training, versions
from dualsft.export.whole import Whole, whole_of
from dualsft.finetune.module import MaskedFinetuneModule
from dualsft.models.loading import model_folder
from dualsft.models.stored import has_own_names, parameter_weights, stored_rows, stored_weights, weights_of
from dualsft.selection.manifest import PUBLISHED
from dualsft.sharding.collectives import any_rank, on_all_ranks, on_rank_zero
from dualsft.sharding.groups import rank
from dualsft.sharding.load import load_sharded
from dualsft.sharding.shard_model import is_sharded
from dualsft.sharding.shards import first_row, local_shard
from dualsft.storage.writing import replacing, sync_folder, sync_tree, writing_to


class ExportModel(Callback):
    """Writes ``model/`` and ``delta.safetensors`` when the fit is over, each completely or not at all."""

    def __init__(self, output_dir: str) -> None:
        self._folder = Path(output_dir)
        self._whole: Whole | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See what the base has beside its language model; refuse, before training, what could not be written."""
        if isinstance(pl_module, MaskedFinetuneModule):
            self._whole = on_all_ranks(lambda: whole_of(pl_module.model_name_or_path))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export finite weights, and refuse others; Lightning does not call this after an interruption or an error."""
        if not isinstance(pl_module, MaskedFinetuneModule):
            raise UserError(f"ExportModel exports a MaskedFinetuneModule, not a {type(pl_module).__name__}.")
        if any_rank(not all(bool(master.isfinite().all()) for master in pl_module.compact.masters)):
            raise UserError("The trained weights are not finite, so nothing is exported; lower the learning rate.")
        changed = _changes(pl_module) if is_sharded(pl_module.model) or rank() == 0 else None
        partial = self._folder / "model.partial"
        on_rank_zero(lambda: shutil.rmtree(partial, ignore_errors=True))
        try:
            with writing_to(self._folder / "model"):
                save_weights(pl_module.model, partial, self._whole)
            on_rank_zero(lambda: self._complete(trainer, pl_module, changed, partial))
        except BaseException:  # what is left of a model takes the room that is wanting
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _complete(self, trainer: Trainer, module: MaskedFinetuneModule, changed: Changes | None, partial: Path) -> None:
        """Write everything that goes with the weights, and move model and delta into place, all of it synced."""
        assert changed is not None  # rank zero knows
        about, delta = _record(trainer, module, changed), self._folder / "delta.safetensors"
        with writing_to(self._folder / "model"):
            copy_companions(module.model_name_or_path, partial)
            write_card(partial, about)
            sync_tree(partial)
        with writing_to(delta), replacing(delta) as unfinished:
            write_delta(unfinished, changed, module.base_fingerprint, about)
            self._replace_model(partial)

    def _replace_model(self, partial: Path) -> None:
        """Put a finished folder in the place of ``model/``; after an interruption it is the old, the new or absent."""
        model, old = self._folder / "model", self._folder / "model.old"
        shutil.rmtree(old, ignore_errors=True)
        if model.exists():
            model.replace(old)
        partial.replace(model)
        sync_folder(self._folder)
        shutil.rmtree(old, ignore_errors=True)


def _changes(module: MaskedFinetuneModule) -> Changes:
    if is_sharded(module.model):
        return sharded_changes(_base_rows(module), dict(module.model.named_parameters()), module.compact.names)
    base = parameter_weights(module.model_name_or_path, module.dtype_name)
    tuned = weights_of(base.folder, module.model)
    return find_changes(base.read, tuned.read, module.compact.names)


def _base_rows(module: MaskedFinetuneModule) -> Callable[[str], Tensor]:
    """A function that gives this rank's rows of a base weight: from the files, or from a sharded copy of the base."""
    parameters = dict(module.model.named_parameters())
    stored = stored_weights(model_folder(module.model_name_or_path))
    if not has_own_names(stored):
        mesh = module.device_mesh
        assert mesh is not None
        base = load_sharded(module.model_name_or_path, mesh, module.dtype_name, cpu_offload=True)
        rows = {name: local_shard(weight.detach()) for name, weight in base.named_parameters()}
        return rows.__getitem__

    def read(name: str) -> Tensor:
        first = first_row(parameters[name])
        return stored_rows(stored, name, slice(first, first + len(local_shard(parameters[name].detach()))))

    return read


def _record(trainer: Trainer, module: MaskedFinetuneModule, changed: Changes) -> dict[str, Any]:
    record = {
        "made_by": "dualsft fit",
        "base": describe_base(module.model_name_or_path, module.base_fingerprint, dtype_name(module.model.dtype)),
        "counts": {
            "changed": sum(changed.counts.values()),
            "trained": module.compact.num_selected,
            "all": module.model.num_parameters(),
        },
        "selection": describe_selection(module.selection.manifest, PUBLISHED) if module.selection else None,
        "training": describe_training(trainer),
        "versions": versions(),
    }
    as_stored: dict[str, Any] = json.loads(json.dumps(record))  # as `export apply` will read it from the delta
    return as_stored
