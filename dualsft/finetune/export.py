"""After the fine-tune: an ordinary Hugging Face checkpoint with its model card, and the delta."""

import json
import shutil
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from transformers import PreTrainedModel

from dualsft.data import load_tokenizer
from dualsft.errors import UserError
from dualsft.finetune.delta import Change, changes, plain, write_delta
from dualsft.finetune.model_card import write_card
from dualsft.finetune.module import MaskedFinetuneModule
from dualsft.finetune.record import describe_base, describe_selection, describe_training, num_weights, versions
from dualsft.finetune.weights import parameter_weights, weights_of
from dualsft.models import model_folder

GENERATION = "generation_config.json"


class ExportModel(Callback):
    """Writes ``model/`` and ``delta.safetensors`` when the fit is over, each whole or not at all.

    Args:
        output_dir: Where they go.
    """

    def __init__(self, output_dir: str) -> None:
        self._folder = Path(output_dir)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export; Lightning does not come here after an interruption or an error.

        Raises:
            UserError: if the trained weights are not finite.
        """
        if not isinstance(pl_module, MaskedFinetuneModule):
            raise UserError(f"ExportModel exports a MaskedFinetuneModule, not a {type(pl_module).__name__}.")
        if not all(bool(master.isfinite().all()) for master in pl_module.compact.masters):
            raise UserError("The trained weights are not finite, so nothing is exported; lower the learning rate.")
        changed = _changes(pl_module)
        about = _record(trainer, pl_module, changed)
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        save_model(pl_module.model, pl_module.model_name_or_path, partial)
        write_card(partial, about)
        delta = self._folder / "delta.safetensors.partial"
        write_delta(delta, changed, pl_module.base_fingerprint, about)
        self._replace_model(partial)
        delta.replace(self._folder / "delta.safetensors")

    def _replace_model(self, partial: Path) -> None:
        """Put a finished folder in the place of ``model/``; whenever this is cut short, that is old, new or absent."""
        model, old = self._folder / "model", self._folder / "model.old"
        shutil.rmtree(old, ignore_errors=True)
        if model.exists():
            model.replace(old)
        partial.replace(model)
        shutil.rmtree(old, ignore_errors=True)


def save_model(model: PreTrainedModel, base: str, folder: Path) -> None:
    """Write a model that is held in memory as a Hugging Face folder, with what its base has beside the weights."""
    model.save_pretrained(folder)
    copy_companions(base, folder)


def copy_companions(base: str, folder: Path) -> None:
    """Give a folder the base's tokenizer, and its generation settings as they stand.

    Raises:
        UserError: if the base has no tokenizer that can be loaded.
    """
    load_tokenizer(base).save_pretrained(folder)
    settings = model_folder(base) / GENERATION
    if settings.is_file():
        shutil.copyfile(settings, folder / GENERATION)


def _changes(module: MaskedFinetuneModule) -> dict[str, Change]:
    base = parameter_weights(module.model_name_or_path, module.dtype_name)
    tuned = weights_of(base.folder, module.model)
    return changes(base.read, tuned.read, module.compact.names)


def _record(trainer: Trainer, module: MaskedFinetuneModule, changed: dict[str, Change]) -> dict[str, Any]:
    record = {
        "made_by": "dualsft fit",
        "base": describe_base(module.model_name_or_path, module.base_fingerprint, plain(module.model.dtype)),
        "counts": {
            "changed": sum(len(index) for index, _ in changed.values()),
            "trained": module.compact.num_selected(),
            "all": num_weights(module.model),
        },
        "selection": describe_selection(module.selection.manifest) if module.selection else None,
        "training": describe_training(trainer),
        "versions": versions(),
    }
    kept: dict[str, Any] = json.loads(json.dumps(record))  # as whoever applies the delta will read it
    return kept
