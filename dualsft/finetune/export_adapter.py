"""Export of a trained adapter at the end of a fit: the adapter itself, and the checkpoint that it makes of the base."""

import shutil
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from dualsft.errors import UserError
from dualsft.export.checkpoints import copy_companions, save_weights
from dualsft.export.whole import Whole, whole_of
from dualsft.finetune.module import MaskedFinetuneModule
from dualsft.storage.writing import sync_tree, writing_to

ADAPTER = "adapter"


class ExportAdapter(Callback):
    """Writes ``adapter/`` and ``model/``, the base with the adapter merged into it, when the fit is over."""

    def __init__(self, output_dir: Path) -> None:
        self._folder = output_dir
        self._whole: Whole | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See what the base has beside its language model; refuse, before training, what could not be written."""
        assert isinstance(pl_module, MaskedFinetuneModule)
        self._whole = whole_of(pl_module.model_name_or_path)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export finite weights, and refuse others."""
        assert isinstance(pl_module, MaskedFinetuneModule)
        if not all(bool(master.isfinite().all()) for master in pl_module.compact.masters):
            raise UserError("The trained weights are not finite, so nothing is exported; lower the learning rate.")
        adapted: Any = pl_module.model
        partial = self._folder / "model.partial"
        for name in (ADAPTER, "model", partial.name):
            shutil.rmtree(self._folder / name, ignore_errors=True)
        with writing_to(self._folder):
            adapted.save_pretrained(self._folder / ADAPTER)
            save_weights(adapted.merge_and_unload(), partial, self._whole)
            copy_companions(pl_module.model_name_or_path, partial)
            sync_tree(partial)
            partial.replace(self._folder / "model")
