"""Which weights a fit ends with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, ProgressBar

from dualsft.errors import UserError
from dualsft.finetune.trainer_checks import is_validated
from dualsft.runs.progress import say

Ending = Literal["last", "best"]


def best_checkpoint(folder: Path, callbacks: Sequence[Callback]) -> ModelCheckpoint | None:
    """What keeps the best weights: by the metric that stops the run early, if one does, else the lowest ``val_loss``.

    Returns:
        None if one of the callbacks does so already: a ModelCheckpoint with a metric to monitor.
    """
    if _monitored(callbacks):
        return None
    stop = next((callback for callback in callbacks if isinstance(callback, EarlyStopping)), None)
    monitor, mode = (stop.monitor, stop.mode) if stop else ("val_loss", "min")
    return ModelCheckpoint(folder, filename="best", monitor=monitor, mode=mode)


def _monitored(callbacks: Sequence[Callback]) -> ModelCheckpoint | None:
    checkpoints = (callback for callback in callbacks if isinstance(callback, ModelCheckpoint))
    return next((checkpoint for checkpoint in checkpoints if checkpoint.monitor), None)


class BestWeights(Callback):
    """Ends a fit with the weights of the best checkpoint.

    That is the best of the first ModelCheckpoint that has a metric to monitor.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See that there will be one.

        Raises:
            UserError: if nothing is validated, or no checkpoint is kept by a metric.
        """
        if not is_validated(trainer):
            raise UserError("model.export is best, but nothing is validated; give data.validation, or export the last.")
        if stage == "fit" and not _monitored(trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError(
                "model.export is best, but no checkpoint is kept by a metric; give trainer.callbacks a ModelCheckpoint "
                "with a monitor."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load it; Lightning's callbacks that average weights have had their turn, and checkpoints hold averages."""
        checkpoint = _monitored(trainer.callbacks)  # type: ignore[attr-defined]
        if checkpoint is None or not checkpoint.best_model_path:
            say("there was no validation to tell which weights are best: the last ones are kept")
            return
        state: dict[str, Any] = torch.load(checkpoint.best_model_path, map_location="cpu", weights_only=True)
        pl_module.load_state_dict(state["state_dict"])
        pl_module.kept_step = state["global_step"]


class EndOfTraining(Callback):
    """Brings on the end of training where a resumed run has nothing left to train.

    Lightning then leaves out ``on_train_end``, in which averages and the best weights are put in. It belongs before the
    callbacks that use the final weights when the fit ends.
    """

    def __init__(self) -> None:
        self._ended = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All is well."""
        self._ended = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Catch up; a progress bar has nothing to close."""
        if self._ended:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, ProgressBar):
                callback.on_train_end(trainer, pl_module)
        pl_module.on_train_end()
