"""Progress of Lightning's loops in the look of all our phases."""

import math
from typing import Any

from lightning import LightningModule
from lightning import Trainer as LightningTrainer
from lightning.pytorch.callbacks import ProgressBar

from dualsft.data.dealing import extent_of
from dualsft.data.layout import Batch
from dualsft.data.loaders import ScoringLoader
from dualsft.runs.bar import Bar
from dualsft.runs.bars import numbered, open_bar


class PhaseBars(ProgressBar):
    """Shows a fit's base validation and its training as two phases, and each later validation inside the training's."""

    def __init__(self) -> None:
        super().__init__()
        self._shown = True
        self._training: Bar | None = None
        self._validation: Bar | None = None
        self._validated_base = self._by_tokens = False

    def disable(self) -> None:
        """Show nothing from here on."""
        self._shown = False

    def enable(self) -> None:
        """Show progress again."""
        self._shown = True

    def on_train_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Begin the phase of training, where an earlier run left it."""
        number = 2 if self._validated_base else 1
        done = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self._training = open_bar(numbered("training", number, number), _batches(trainer), done, show=self._shown)

    def on_train_batch_end(
        self, trainer: LightningTrainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch, and show epoch and loss."""
        assert self._training is not None
        loss = trainer.callback_metrics.get("train_loss")
        epochs = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        told = "" if loss is None else f", loss {float(loss):.3g}"
        self._training.advance(1, f"epoch {trainer.current_epoch + 1}{epochs}{told}")

    def on_train_end(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """End the phase of training."""
        self._end(finished=True)

    def on_validation_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Begin a pass over the validation sets; the first of a fit is a phase of its own."""
        title = "validation"
        if trainer.sanity_checking:
            title, self._validated_base = numbered("base model's validation", 1, 2), True
        elif self._training is None:
            title = numbered(title, 1, 1)
        found = trainer.val_dataloaders or []
        loaders = found if isinstance(found, list) else [found]
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        counts = [int(count) for count in batches if math.isfinite(count)]
        tokens = [loader.all_tokens for loader in loaders if isinstance(loader, ScoringLoader)]
        self._by_tokens = len(tokens) == len(loaders) and counts == [len(loader) for loader in loaders]
        self._validation = open_bar(title, sum(tokens if self._by_tokens else counts), show=self._shown)

    def on_validation_batch_end(
        self,
        trainer: LightningTrainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch by its tokens, as the longest examples come first."""
        assert self._validation is not None
        self._validation.advance(extent_of(batch).tokens if self._by_tokens else 1)

    def on_validation_end(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """End the pass over the validation sets."""
        if self._validation is not None:
            self._validation.close(finished=True)
            self._validation = None

    def on_exception(self, trainer: LightningTrainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the bars as they are."""
        self._end(finished=False)

    def teardown(self, trainer: LightningTrainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no bar open, whatever happened."""
        self._end(finished=False)

    def _end(self, finished: bool) -> None:
        for shown in filter(None, (self._validation, self._training)):
            shown.close(finished)
        self._validation = self._training = None


def _batches(trainer: LightningTrainer) -> float:
    """How many batches a training has in all its epochs, as far as epochs or steps are limited."""
    epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else math.inf
    steps = trainer.max_steps if trainer.max_steps > 0 else math.inf
    most = min(trainer.num_training_batches * epochs, steps * trainer.accumulate_grad_batches)
    return most if math.isfinite(most) else trainer.num_training_batches


def has_own_bar(trainer: dict[str, Any]) -> bool:
    """Whether a trainer's settings have a progress bar of their own, or none."""
    given = trainer.get("callbacks") or []
    callbacks = given if isinstance(given, list) else [given]
    off = trainer.get("enable_progress_bar") is False or bool(trainer.get("barebones"))
    return off or any(isinstance(callback, ProgressBar) for callback in callbacks)
