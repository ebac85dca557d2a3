"""What lies on the disk while a selection is made."""

import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dualsft.allocators import Diverse
from dualsft.errors import UserError
from dualsft.models.loading import parameter_shapes
from dualsft.paths import PoolPath, TargetPath
from dualsft.runs.phase_keeper import PhaseKeeper
from dualsft.runs.phase_store import PhaseStore
from dualsft.scorers import DiagonalFisher
from dualsft.selection import Warmup, load_selection, passes, scored
from dualsft.selection.paths.settings import PathSettings
from dualsft.selection.prior import Prior
from tests.world.damage import damage_file
from tests.world.faults import KilledError, kill_at, kill_often, killed_run
from tests.world.folders import size_of, watched
from tests.world.jobs import ADAM, SGD, Inputs, contents, select, write_inputs

PRIOR: dict[str, Any] = {**ADAM, "prior": Prior(weight=0.5, fraction=0.5)}
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
Usage = namedtuple("Usage", "free")


def count(inputs: Inputs) -> int:
    """The weights of a model."""
    return sum(torch.Size(shape).numel() for shape in parameter_shapes(inputs.model).values())


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A model in bfloat16 whose weights are most of what is written."""
    return write_inputs(tmp_path_factory.mktemp("large"), dtype=torch.bfloat16, **SIZES)


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({**ADAM, "dtype": "bfloat16"}, 10),  # weights 2, second moment or scores 4, P v 4
        ({**PRIOR, "dtype": "bfloat16"}, 10),
        ({**PRIOR, "dtype": "bfloat16", "parameter_scores": "bfloat16", "token_scores": True}, 10),
        ({**PRIOR, "dtype": "float32"}, 12),
        ({**SGD, "dtype": "bfloat16"}, 8),  # P v and scores
    ],
    ids=["adam", "with the prior", "rounded scores", "float32", "sgd"],
)
def test_a_selection_takes_no_more_bytes_a_weight(
    large: Inputs, tmp_path: Path, options: dict[str, Any], most: float
) -> None:
    """At its peak, what a kill would resume from and the result together; and in the end scores and mask alone."""
    with watched(tmp_path) as sizes:
        select(large, tmp_path, options)
    weights = count(large)
    assert weights > 300_000
    assert most * weights < max(sizes) < (most + 0.25) * weights
    kept = 2 if "parameter_scores" in options else 4
    assert size_of(tmp_path) < (kept + 0.125 + 0.1) * weights


@pytest.mark.parametrize("pieces", [1, 3])
def test_points_of_a_path_leave_their_scores_alone(large: Inputs, tmp_path: Path, pieces: int) -> None:
    """Their weights (2) and second moments (4), to resume from, and at the latest one v, the sums, and the scores."""
    path = PathSettings(along=PoolPath(), epochs=3, pieces=pieces)
    with watched(tmp_path) as sizes:
        select(large, tmp_path, {**ADAM, "path": path, "dtype": "bfloat16"})
    most = (pieces + 1) * 2 + pieces * 4 + 4 + 4 + (4 if pieces == 1 else 8)  # scores so far, and those with this point
    assert max(sizes) < (most + 0.5) * count(large)


def test_states_under_way_take_one_copy_where_the_disk_has_room_for_no_more(
    large: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kept at every batch, they take 24 bytes a weight with room for them; on a small disk the older one goes first."""
    options = {**PRIOR, "dtype": "bfloat16", "save_minutes": 1e-9}
    with watched(tmp_path / "roomy") as sizes:
        select(large, tmp_path / "roomy", options)
    weights = count(large)
    assert 24 * weights < max(sizes) < 24.25 * weights
    room, spare = 12.5 * weights, 2**26

    def usage(_: Path) -> Usage:
        return Usage(free=max(0, room - size_of(tmp_path / "small")) + spare)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    capsys.readouterr()
    with watched(tmp_path / "small") as sizes:
        select(large, tmp_path / "small", options)
    assert 12 * weights < max(sizes) < room
    assert "the disk has no room for the state of the prior-gradient.under-way" in capsys.readouterr().err
    assert contents(tmp_path / "small") == contents(tmp_path / "roomy")


def die_at_sync(patch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Let the run die when it has written its n-th file, before that is moved to its place; lists the files."""
    written: list[int] = []

    def sync(_: int) -> None:
        written.append(1)
        if len(written) == number:
            raise KilledError

    patch.setattr(os, "fsync", sync)
    return written


@pytest.mark.slow
@pytest.mark.parametrize("options", [PRIOR, {**PRIOR, "order": "data_then_parameters"}], ids=["both sides", "by turns"])
def test_a_kill_at_any_file_leaves_what_the_run_resumes_from(
    inputs: Inputs, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Whichever file is being written, the resumed run gives the bytes of an unbroken one."""
    with pytest.MonkeyPatch.context() as patch:
        files = die_at_sync(patch, -1)
        select(inputs, tmp_path / "unbroken", options)
    expected = contents(tmp_path / "unbroken")
    for number in range(3, len(files) + 1, 3):  # the first two are the run's description
        out = tmp_path / f"killed {number}"
        with pytest.MonkeyPatch.context() as patch:
            die_at_sync(patch, number)
            with pytest.raises(KilledError):
                select(inputs, out, options)
        select(inputs, out, options, resume=(out / ".unfinished" / "run.json").exists())
        assert contents(out) == expected, number
        shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.parametrize("every", [2, 3])
def test_a_kill_after_any_state_leaves_what_the_run_resumes_from(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Killed once a state is kept, before what it replaces is dropped."""
    select(inputs, tmp_path / "unbroken", PRIOR)
    assert kill_often(inputs, tmp_path / "killed", PRIOR, monkeypatch, every) > 1
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")


def test_scores_are_all_that_is_left_of_the_passes(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies in the choice has dropped the states before, and goes on without any pass."""
    options = {**PRIOR, "token_scores": True}
    select(inputs, tmp_path / "unbroken", options)
    out = tmp_path / "killed"
    killed_run(inputs, out, options, scored, "drop_all_but_scores", 1, True)
    assert sorted(path.name for path in (out / ".unfinished").glob("*.safetensors")) == [
        "scored.safetensors",
        "step-size.safetensors",
    ]
    with pytest.raises(UserError, match=r"holds scores made with model\.step_size 2e-05, not 1\.0"):
        select(inputs, out, {**options, "step_size": 1.0}, resume=True)
    calls = kill_at(monkeypatch, passes, "gradient_pass", call=99)
    select(inputs, out, options, resume=True)
    assert not calls
    assert contents(out) == contents(tmp_path / "unbroken")
    phases = [
        [{**phase, "seconds": 0, "peak_memory_bytes": 0, "tokens_per_second": 0} for phase in of.manifest["phases"]]
        for of in (load_selection(out), load_selection(tmp_path / "unbroken"))
    ]
    assert phases[0] == phases[1]


WALK = PathSettings(along=TargetPath(), epochs=2, learning_rate=1e-3, pieces=2, held_out=0.0, tolerance=10.0)
OTHERS: dict[str, dict[str, Any]] = {
    "stability": {**SGD, "stability": True},
    "sketches": {**ADAM, "data_allocator": Diverse(), "normalize": "gradient_norm"},
    "second order": {**SGD, "scorer": DiagonalFisher(source="empirical_fisher")},
    "along the target": {"path": replace(WALK, columns="product"), "token_scores": True},
    "along the pool": {**ADAM, "path": replace(WALK, along=PoolPath()), "parameter_scores": "bfloat16"},
    "all weights": {"path": WALK, "parameter_budget": None},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_whatever_is_scored_once_goes_on_from_its_scores(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """All that a selection tells of its scores is kept with them: no model is looked at any more."""
    select(inputs, tmp_path / "unbroken", OTHERS[case])
    killed_run(inputs, tmp_path / "killed", OTHERS[case], scored, "drop_all_but_scores", 1, True)
    calls = kill_at(monkeypatch, passes, "gradient_pass", call=99)
    select(inputs, tmp_path / "killed", OTHERS[case], resume=True)
    assert not calls
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")


@pytest.mark.parametrize("damaged", ["scored.safetensors", "scores/parameter_scores.safetensors"])
def test_damaged_scores_are_computed_again(
    inputs: Inputs, tmp_path: Path, damaged: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the weights too, which are in a file of their own."""
    select(inputs, tmp_path / "unbroken", PRIOR)
    out = tmp_path / "killed"
    killed_run(inputs, out, PRIOR, scored, "drop_all_but_scores", 1, True)
    damage_file(out / ".unfinished" / damaged, "flipped")
    capsys.readouterr()
    select(inputs, out, PRIOR, resume=True)
    assert "damaged" in capsys.readouterr().err
    assert contents(out) == contents(tmp_path / "unbroken")


def test_a_direction_that_is_damaged_takes_the_warm_up_with_it(inputs: Inputs, tmp_path: Path) -> None:
    """The second moment behind it is gone by then, so that the run starts again from the beginning."""
    select(inputs, tmp_path / "unbroken", PRIOR)
    killed_run(inputs, tmp_path / "killed", PRIOR, passes, "gradient_pass", 3)
    state = tmp_path / "killed" / ".unfinished"
    assert not (state / "warm-up-moments.safetensors").exists()
    damage_file(state / "validation-direction.safetensors", "flipped")
    select(inputs, tmp_path / "killed", PRIOR, resume=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")


def test_files_in_the_middle_of_being_written_are_swept_up(inputs: Inputs, tmp_path: Path) -> None:
    """What a kill left of them would lie there until the end of the run."""
    killed_run(inputs, tmp_path, PRIOR, passes, "gradient_pass", 1)
    left = [tmp_path / ".unfinished" / name for name in (".tmpX", "scores.under-way.safetensors.partial")]
    for path in left:
        path.write_bytes(b"half")
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, passes, "gradient_pass", 1)
        with pytest.raises(KilledError):
            select(inputs, tmp_path, PRIOR, resume=True)
    assert not any(path.exists() for path in left)


def test_a_second_moment_that_nothing_uses_is_not_kept(inputs: Inputs, tmp_path: Path) -> None:
    """A warm-up without Adam's preconditioner leaves its weights alone."""
    options = {"preconditioner": "none", "warmup": Warmup(fraction=0.5)}
    killed_run(inputs, tmp_path, options, passes, "gradient_pass", 1)
    assert [path.name for path in (tmp_path / ".unfinished").glob("warm-up*")] == ["warm-up.safetensors"]


def test_a_state_that_cannot_replace_the_older_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk has room for neither, the phase goes on without; it would start again after a kill."""
    from dualsft.runs.progress import PhaseLog

    keeper = PhaseKeeper(PhaseStore(tmp_path), "pass", 1.0)
    with PhaseLog(show=False).phase("pass", 1) as keeper.meter:
        keeper.save({"w": torch.ones(4)}, {})
        assert PhaseStore(tmp_path).load(keeper.name) is not None
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=2**26))
        keeper.save({"w": torch.ones(4)}, {})
    assert list(tmp_path.iterdir()) == []
