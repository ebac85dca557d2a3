"""``metrics.csv``: one file of a fit, which a resumed run continues as if it had never been broken off.

A checkpoint holds how many rows there were, and the row of the batch that it was made after, which Lightning logs next.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from dualsft.errors import UserError
from dualsft.sharding.collectives import is_rank_zero
from dualsft.storage.writing import replacing, sync_to_disk, writing_to

Row = dict[str, Any]
_STATE = "metrics_log"


class MetricsLog(CSVLogger):
    """Lightning's CSVLogger, but for what it does to the file of an earlier run: it deletes it."""

    @property
    @rank_zero_experiment
    def experiment(self) -> "MetricsFile":
        """The file, on rank zero."""
        if self._experiment is None:
            self._experiment = MetricsFile(self.log_dir)
        assert isinstance(self._experiment, MetricsFile)
        return self._experiment


class MetricsFile(ExperimentWriter):
    """The rows of a ``metrics.csv``; errors of the system are `UserError`.

    Attributes:
        count: How many rows this run, and those that it continues, have written.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self._path, self.count = Path(self.metrics_file_path), 0

    def save(self) -> None:
        """Append the rows that have been logged; a `UserError` if those before them, or their folder, are gone."""
        rows, folder = len(self.metrics), self._path.parent
        if (self.count and not self._path.is_file()) or not folder.is_dir():
            gone = self._path if folder.is_dir() else folder
            raise UserError(
                f"{gone} was removed while this run was at work on it; leave the output folder alone while a run "
                "is at work, and run it again."
            )
        with writing_to(self._path):
            super().save()
        self.count += rows

    def sync(self) -> None:
        """Make the system write the rows to the disk now."""
        if self._path.is_file():
            with writing_to(self._path):
                sync_to_disk(self._path)

    def go_on(self, count: int | None, pending: Sequence[Row]) -> None:
        """Keep so many of the rows that are there, None for all, and add some."""
        rows = [*self._rows()[:count], *pending]
        self.count = len(rows)
        self.metrics_keys = sorted({name for row in rows for name in row})
        if rows:
            self._rewrite(rows)
        else:
            self._path.unlink(missing_ok=True)

    def _rows(self) -> list[Row]:
        if not self._path.is_file():
            return []
        with open(self._path, encoding="utf-8", errors="replace", newline="") as stream:
            rows = list(csv.DictReader(stream))
        return [{name: value for name, value in row.items() if name and value} for row in rows]

    def _rewrite(self, rows: Iterable[Row]) -> None:
        with writing_to(self._path), replacing(self._path) as partial, open(partial, "w", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._rewrite(self._rows())  # of Lightning's, a kill would leave half

    def _check_log_dir_exists(self) -> None:
        """Leave the file as it is; Lightning's writer deletes it."""


class ContinueMetrics(Callback):
    """Has the `MetricsLog` of a resumed run continue at the row where its checkpoint was made."""

    _resumed = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the number of rows, and the one that Lightning logs when the callbacks are done with this batch."""
        pending = _pending(trainer)  # on all ranks, whose metrics may be reduced
        for file in _files(trainer):
            file.sync()
            checkpoint[_STATE] = {"rows": file.count, "pending": pending}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Bring the file to the checkpoint's rows; one from before they were kept leaves all."""
        self._resumed = True
        state = checkpoint.get(_STATE, {"rows": None, "pending": []})
        for file in _files(trainer):
            file.go_on(state["rows"], state["pending"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the rows of a run of which no checkpoint is left."""
        for file in _files(trainer) if not self._resumed else ():
            file.go_on(0, [])


def _files(trainer: Trainer) -> list[MetricsFile]:
    """The file on rank zero, if the trainer logs to one."""
    return [log.experiment for log in trainer.loggers if isinstance(log, MetricsLog)] if is_rank_zero() else []


def _pending(trainer: Trainer) -> list[Row]:
    """The row of the batch that callbacks are being told of, if it will have one."""
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    batches: Any = loop.batch_progress.current
    if batches.processed == batches.completed or loop._should_accumulate() or not connector.should_update_logs:
        return []
    if not (metrics := convert_tensors_to_scalars(connector.metrics["log"])):
        return []
    return [{"epoch": trainer.current_epoch, "step": loop._batches_that_stepped, **metrics}]
