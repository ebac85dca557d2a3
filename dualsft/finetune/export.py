"""After the fine-tune: an ordinary Hugging Face checkpoint, and the delta."""

import shutil
from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from dualsft.data import load_tokenizer
from dualsft.errors import UserError
from dualsft.finetune.delta import write_delta
from dualsft.finetune.module import MaskedFinetuneModule


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
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        pl_module.model.save_pretrained(partial)
        load_tokenizer(pl_module.model_name_or_path).save_pretrained(partial)
        delta = self._folder / "delta.safetensors.partial"
        write_delta(delta, pl_module.model, pl_module.compact, pl_module.base_fingerprint)
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
