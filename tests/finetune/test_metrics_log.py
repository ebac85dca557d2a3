"""The log of a fit that was broken off."""

import csv
from pathlib import Path
from typing import Any

import pytest

from dualsft.errors import UserError
from dualsft.finetune.metrics_log import MetricsFile
from tests.finetune.test_checkpointing import PowerCut
from tests.world.damage import full_disk
from tests.world.jobs import Workspace, fit


def written(folder: Path, *rows: dict[str, Any]) -> MetricsFile:
    """A log of these rows."""
    log = MetricsFile(str(folder))
    for row in rows:
        log.metrics.append(row)
        log.save()
    return log


def stored(folder: Path) -> list[dict[str, str]]:
    """The rows that a reader finds, without what is empty."""
    with open(folder / "metrics.csv", newline="") as stream:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(stream)]


def test_a_log_goes_on_where_it_is_told_to(tmp_path: Path) -> None:
    """Rows after that are dropped, also one that was cut in the middle; a new column keeps the rows before."""
    assert written(tmp_path, {"step": 0, "a": 1}, {"step": 1, "a": 2}, {"step": 2, "a": 3}).count == 3
    with open(tmp_path / "metrics.csv", "a") as stream:
        stream.write("4")
    log = MetricsFile(str(tmp_path))
    log.go_on(1, [{"step": 1, "a": 5}])
    assert log.count == 2
    log.metrics.append({"step": 1, "b": 6})
    log.save()
    assert stored(tmp_path) == [{"step": "0", "a": "1"}, {"step": "1", "a": "5"}, {"step": "1", "b": "6"}]
    again = MetricsFile(str(tmp_path))
    again.go_on(None, [])
    assert again.count == 3
    again.go_on(0, [])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    """The file is named."""
    log = written(tmp_path, {"step": 0})
    log.metrics += [{"step": step} for step in range(1000)]
    with pytest.raises(UserError, match=r"metrics\.csv cannot be written \(File too large\)"), full_disk(500):
        log.save()


OPTIONS = {
    "every batch": [],
    "accumulated": ["--trainer.accumulate_grad_batches", "2", "--trainer.limit_train_batches", "3"],
    "seldom": ["--trainer.log_every_n_steps", "2"],
    "with the learning rate": [*("--trainer.callbacks+", "LearningRateMonitor"), *("--lr_scheduler", "ConstantLR")],
    "validated within the epoch": ["--trainer.val_check_interval", "1"],
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The lr scheduler dict")
@pytest.mark.parametrize("how", OPTIONS)
def test_the_log_of_a_broken_fit_is_that_of_an_unbroken_one(workspace: Workspace, folder: Path, how: str) -> None:
    """No row is missing or there twice, in one file of one folder, wherever the checkpoint was made."""
    options = [*OPTIONS[how], "--model.save_minutes", "1e-6"]
    fit(workspace, folder / "whole", *options)
    cut = ["--trainer.callbacks+", f"{PowerCut.__module__}.PowerCut", "--trainer.callbacks.step", "2"]
    with pytest.raises(RuntimeError, match="power cut"):
        fit(workspace, folder / "broken", *options, *cut)
    fit(workspace, folder / "broken", *options, "--resume")
    logs = [list((folder / name / "logs").rglob("metrics.csv")) for name in ("whole", "broken")]
    assert [len(found) for found in logs] == [1, 1]
    assert logs[0][0].read_bytes() == logs[1][0].read_bytes()
