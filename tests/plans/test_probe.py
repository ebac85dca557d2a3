"""What is told of a run on a few batches."""

from pathlib import Path

import pytest

from dualsft.paths import PoolPath, TargetPath
from dualsft.plans.job import FitJob, Job, SelectJob
from dualsft.plans.phase import Phase, Plan
from dualsft.plans.probe import PhaseSeen, Seen, probe_options, probe_text
from dualsft.selection.paths.settings import PathSettings
from dualsft.selection.prior import Prior
from dualsft.selection.settings import SelectionSettings
from dualsft.selection.warmup import Warmup
from tests.plans.cases import tiny_shape

GIB = 2**30


def seen(*phases: tuple[str, float]) -> Seen:
    """A run whose phases held a GiB each; a tenth of the pool and half of the validation set took part."""
    tokens = {"pool": (100, 1000), "validation": (50, 100)}
    return Seen([PhaseSeen(name, GIB, seconds, work=10) for name, seconds in phases], tokens, 2.0, 3.0)


def rows(job: Job, found: Seen, plan: Plan | None = None) -> dict[str, list[str]]:
    """Phase -> the other cells of its row; the last line under ``all``."""
    text = probe_text(job, plan, found)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {**{row[0]: row[1:] for row in cells[2:]}, "all": [text.rsplit(": ", 1)[1]]}


def test_times_are_those_of_all_data(tmp_path: Path) -> None:
    """Each phase by what it passes over: the pool, a share of it some times, or the validation sets."""
    settings = SelectionSettings(warmup=Warmup(fraction=0.5, epochs=2), prior=Prior(weight=0.1, fraction=0.2))
    job = SelectJob(tiny_shape(tmp_path), settings=settings)
    names = ("warm-up", "validation gradient of a", "validation half 1 gradient", "prior gradient", "scores")
    found = rows(job, seen(*((name, 4.0) for name in names)), Plan([Phase("scores", {"weights": 2 * GIB})]))
    assert {name: cells[3] for name, cells in found.items() if name != "all"} == {
        "warm-up": "40 s",
        "validation gradient": "16 s",  # both passes over the set
        "prior gradient": "8.0 s",
        "scores": "40 s",
    }
    assert found["scores"][:3] == ["2.00", "1.00", "0.50"]
    assert found["all"] == ["109 s"]  # 104 of the phases, and 5 beside them


def test_times_of_a_path_and_of_a_fit(tmp_path: Path) -> None:
    """A path along the target is over the validation set, one along the pool over the warm-up's share."""
    shape, found = tiny_shape(tmp_path), seen(("path to a", 4.0), ("pool loss at point 0 of the path to a", 1.0))
    for along, seconds in ((TargetPath(), "8.0 s"), (PoolPath(), "20 s")):
        settings = SelectionSettings(warmup=Warmup(fraction=0.5), path=PathSettings(along=along))
        of = rows(SelectJob(shape, settings=settings), found)
        assert (of["path"][3], of["pool loss"][3]) == (seconds, "10 s")
    fit = rows(FitJob(shape, epochs=3), seen(("training", 4.0), ("base model's validation", 1.0), ("validation", 1.0)))
    few = rows(FitJob(shape, epochs=3, batches=250), seen(("training", 4.0), ("base model's validation", 1.0)))
    assert (few["training"][-1], few["3 validations"][-1]) == ("100 s", "6.0 s")  # of 100 batches an epoch
    told = {"training": "2.0 min", "4 validations": "8.0 s", "all": "2.2 min"}
    assert {name: cells[-1] for name, cells in fit.items()} == told


@pytest.mark.parametrize("warmup", [Warmup(fraction=0.0), Warmup(checkpoint="some")])
def test_a_probe_has_no_warm_up_that_the_job_has_not(warmup: Warmup, tmp_path: Path) -> None:
    """Otherwise all of the few rows are warmed up on; a budget in examples becomes one that they can meet."""
    job = SelectJob(
        tiny_shape(tmp_path), settings=SelectionSettings(warmup=warmup, preconditioner="none", data_budget=500)
    )
    assert "--model.warmup.fraction" not in list(probe_options(job))
    assert list(probe_options(job))[-4:] == ["--model.data_allocator", "top_k", "--model.data_budget", "0.5"]
    assert "--model.warmup.fraction" in list(probe_options(SelectJob(tiny_shape(tmp_path / "b"))))
