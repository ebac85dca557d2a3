"""Checkpoints every so often, none of which loses a validation."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class RecentCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that leaves out a batch after which the run validates.

    Lightning does not make up for that validation when a run goes on from there, and what depends on it, such as early
    stopping, the best weights and the report, would be another.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, and no validation is due."""
        batches = trainer.fit_loop._data_fetcher
        if batches is None or not trainer.fit_loop.epoch_loop._should_check_val_fx(batches):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
