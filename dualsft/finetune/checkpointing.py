"""The checkpoints that a fit keeps, and the weights that it ends with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, ProgressBar

from dualsft.errors import UserError
from dualsft.finetune.checkpoint_files import refuse_damaged
from dualsft.finetune.trainer_checks import is_validated
from dualsft.runs.progress import say

Ending = Literal["last", "best"]


def best_checkpoint(folder: Path, callbacks: Sequence[Callback]) -> ModelCheckpoint | None:
    """A checkpoint callback for the best weights, by the metric of an EarlyStopping, else by the lowest ``val_loss``.

    None if a ModelCheckpoint with a metric to monitor is among the callbacks already.
    """
    if _monitored(callbacks):
        return None
    stop = next((callback for callback in callbacks if isinstance(callback, EarlyStopping)), None)
    monitor, mode = (stop.monitor, stop.mode) if stop else ("val_loss", "min")
    return ModelCheckpoint(folder, filename="best", monitor=monitor, mode=mode)


def _monitored(callbacks: Sequence[Callback]) -> ModelCheckpoint | None:
    checkpoints = (callback for callback in callbacks if isinstance(callback, ModelCheckpoint))
    return next((checkpoint for checkpoint in checkpoints if checkpoint.monitor), None)


class KeepEpochCount(Callback):
    """Keeps checkpoints resumable in a run that was itself resumed from the last batch of an epoch.

    Lightning then starts the next epoch without counting it as begun, and treats every later checkpoint of that run as
    one between two epochs: the loader's position would be ignored. Within an epoch, one more has begun than has ended.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restores the count; a checkpoint may follow this batch."""
        epochs = trainer.fit_loop.epoch_progress
        trackers: tuple[Any, ...] = (epochs.total, epochs.current)
        for tracker in trackers:
            tracker.ready = tracker.started = tracker.processed + 1


class RecentCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint at regular intervals that saves no checkpoint just before a validation.

    Lightning does not catch up on that validation when a run resumes from there, and early stopping, the best weights
    and the report, which depend on it, would differ.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, and no validation is due."""
        batches = trainer.fit_loop._data_fetcher
        if batches is None or not trainer.fit_loop.epoch_loop._should_check_val_fx(batches):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class BestWeights(Callback):
    """Loads, when a fit ends, the best checkpoint of the first ModelCheckpoint that monitors a metric."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there will be a best checkpoint."""
        if not is_validated(trainer):
            raise UserError("model.export is best, but nothing is validated; give data.validation, or export the last.")
        if stage == "fit" and not _monitored(trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError(
                "model.export is best, but no checkpoint is kept by a metric; give trainer.callbacks a ModelCheckpoint "
                "with a monitor."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the best weights, after callbacks that average weights; checkpoints hold averages."""
        checkpoint = _monitored(trainer.callbacks)  # type: ignore[attr-defined]
        if checkpoint is None or not checkpoint.best_model_path:
            say("there was no validation to tell which weights are best: the last ones are kept")
            return
        refuse_damaged(Path(checkpoint.best_model_path))
        state: dict[str, Any] = torch.load(checkpoint.best_model_path, map_location="cpu", weights_only=True)
        pl_module.load_state_dict(state["state_dict"])
        pl_module.best_step = state["global_step"]


class EndOfTraining(Callback):
    """Calls ``on_train_end`` where a resumed run has nothing left to train, which Lightning does not.

    That hook loads averages and the best weights. This callback belongs before the callbacks that use the final weights
    when the fit ends.
    """

    _ended = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember that Lightning has called this hook."""
        self._ended = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call the hook of every callback but progress bars, which have nothing to close, and of the module."""
        if self._ended:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, ProgressBar):
                callback.on_train_end(trainer, pl_module)
        pl_module.on_train_end()
