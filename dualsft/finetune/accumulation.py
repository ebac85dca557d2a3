"""How many batches a step accumulates, where a GradientAccumulationScheduler changes it between epochs."""

from collections.abc import Iterator

from lightning import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler


def most_accumulated(trainer: Trainer) -> int:
    """The largest number of batches that a step of the run accumulates."""
    scheduled = (number for schedule in _schedules(trainer) for number in schedule.scheduling.values())
    return max(trainer.accumulate_grad_batches, *scheduled, 1)


def follow_accumulation_schedule(trainer: Trainer) -> None:
    """Set the number of the current epoch, which Lightning does only where an epoch starts, not where one resumes."""
    for schedule in _schedules(trainer):
        schedule.on_train_epoch_start(trainer)


def _schedules(trainer: Trainer) -> Iterator[GradientAccumulationScheduler]:
    return (c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler))  # type: ignore[attr-defined]
