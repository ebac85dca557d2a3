"""A run killed in the middle of a phase goes on with the batch that it was at, to the same result."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from dualsft import SelectionModule, load_selection
from dualsft.allocators import Diverse
from dualsft.matrix.model_calls import ModelCalls
from dualsft.runs import phase_store, state_file
from dualsft.runs.folder import RunFolder
from dualsft.runs.phase_keeper import PhaseKeeper
from dualsft.runs.progress import PhaseLog
from dualsft.scorers import DiagonalFisher, HessianVector
from dualsft.selection import dense_training, passes
from dualsft.selection.prior import Prior
from tests.cases import collate, make_examples
from tests.world.faults import KilledError, PoolAware, kill_at, killed_run, poisoned_by
from tests.world.jobs import ADAM, SGD, Inputs, contents, select, write_inputs

ALWAYS: dict[str, Any] = {"save_minutes": 1e-9}
"""The state is kept before every batch."""


@dataclass(frozen=True)
class Case:
    """What is selected, and by which module."""

    options: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    module: type[SelectionModule] = SelectionModule


CASES = {
    "a warm-up with dropout, and one pass": Case(ADAM, {"batch_tokens": 60}),
    "one pass that meets infinite gradients": Case(
        {**SGD, "token_scores": True}, {"batch_tokens": 60}, poisoned_by(gradient="W")
    ),
    "two passes over packed rows, by token, that meet what is not finite": Case(
        {**SGD, "scorer": PoolAware(), "token_scores": True},
        {"packing": True, "batch_tokens": 96},
        poisoned_by(gradient="4", loss="P"),
    ),
    "one pass over packed rows that measures single gradients": Case(
        {**ADAM, "data_allocator": Diverse(), "data_budget": 3}, {"packing": True, "batch_tokens": 96}
    ),
    "second derivatives and a prior, in two rounds": Case(
        {
            **ADAM,
            "scorer": HessianVector(),
            "step_size": 1e-3,
            "prior": Prior(weight=0.5, fraction=0.5),
            "order": "data_then_parameters",
            "rounds": 2,
        },
        {"batch_tokens": 60},
    ),
    "differences at displaced weights": Case(
        {**SGD, "scorer": HessianVector("finite_difference"), "step_size": 0.1, "prior": Prior(0.5, 0.5)},
        {"batch_tokens": 60},
    ),
    "squared gradients": Case({**SGD, "scorer": DiagonalFisher("empirical_fisher"), "step_size": 0.1}),
}
KILLS: dict[str, tuple[Any, str]] = {
    "as soon as the state is kept": (PhaseKeeper, "save"),
    "while the state is written": (state_file, "save_file"),
}


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A model with dropout."""
    inputs = write_inputs(tmp_path_factory.mktemp("forgetful"))
    path = Path(inputs.model) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.5}))
    return inputs


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """A selection, to be made."""
    found = CASES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.world.jobs.SelectionModule", found.module)
        yield found


@pytest.fixture(scope="module")
def unbroken(forgetful: Inputs, case: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an unbroken run leaves."""
    folder = tmp_path_factory.mktemp("unbroken") / "out"
    return contents(select(forgetful, folder, case.options, data=case.data, seed=1).folder)


def resumed_until_done(
    inputs: Inputs, folder: Path, options: dict[str, Any], kill: str, calls: Iterable[int], **run: Any
) -> int:
    """Resumes a run that dies at such a call each time (see `kill_at`), until it gets past it; counts the deaths."""
    for deaths, call in enumerate(itertools.islice(calls, 100)):
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, *KILLS[kill], call, after=True)
            try:
                select(inputs, folder, options, resume=True, **run)
            except KilledError:
                continue
            return deaths
    raise AssertionError("no progress")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "kill"), list(zip(CASES, itertools.cycle(KILLS), strict=False)), indirect=["case"])
def test_a_run_killed_again_and_again_gives_the_same_bytes(
    forgetful: Inputs, tmp_path: Path, case: Case, unbroken: dict[str, bytes], kill: str
) -> None:
    """A run that gets some batches further each time before it dies ends in the artifact of the unbroken run."""
    options, draw = {**case.options, **ALWAYS}, random.Random(f"{case.data} {kill}")
    calls = (draw.randint(3, 8) for _ in itertools.count())
    deaths = resumed_until_done(forgetful, tmp_path / "killed", options, kill, calls, data=case.data, seed=1)
    assert deaths >= 1
    assert contents(tmp_path / "killed") == unbroken
    assert not (tmp_path / "killed" / ".unfinished").exists()
    if case.module is not SelectionModule:
        assert "nonfinite" in load_selection(tmp_path / "killed").examples["status"].to_pylist()


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The example ids of every batch whose losses are taken, in order, whichever run takes them."""
    batches: list[tuple[int, ...]] = []
    for place, name in ((dense_training, "example_losses"), (ModelCalls, "begin")):
        original = getattr(place, name)

        def noting(first: Any, batch: Any, *rest: Any, original: Any = original) -> Any:
            batches.append(tuple(batch["example_id"].tolist()))
            return original(first, batch, *rest)

        monkeypatch.setattr(place, name, noting)
    return batches


def test_no_batch_is_passed_twice(forgetful: Inputs, tmp_path: Path, passed: list[tuple[int, ...]]) -> None:
    """Killed at every batch, all parts together take each once, and leave the bytes and counts of an unbroken run."""
    data = {"batch_tokens": 60}
    unbroken = select(forgetful, tmp_path / "unbroken", ADAM, data=data)
    expected = Counter(passed)
    passed.clear()
    kill, every = "as soon as the state is kept", itertools.repeat(2)
    deaths = resumed_until_done(forgetful, tmp_path / "killed", {**ADAM, **ALWAYS}, kill, every, data=data)
    assert Counter(passed) == expected
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")
    assert deaths == sum(expected.values()) - 1
    costs = [
        [(phase["name"], phase["examples"], phase["tokens"]) for phase in selection.manifest["phases"]]
        for selection in (unbroken, load_selection(tmp_path / "killed"))
    ]
    assert costs[0] == costs[1]


def test_time_and_memory_of_killed_parts_count(inputs: Inputs, tmp_path: Path) -> None:
    """A resumed phase has the seconds of all its parts, and the larger peak."""
    options = {**SGD, **ALWAYS}
    killed_run(inputs, tmp_path, options, PhaseKeeper, "save", 3, True)
    state = RunFolder(tmp_path, resume=True)
    tensors, notes = state.load("scores.under-way") or ({}, {})
    state.save("scores.under-way", tensors, {**notes, "seconds": 1000.0, "peak_memory_bytes": 2**50})
    (phase,) = select(inputs, tmp_path, options, resume=True).manifest["phases"][1:]
    assert phase["name"] == "scores"
    assert 1000 < phase["seconds"] < 1100
    assert phase["peak_memory_bytes"] == 2**50


@pytest.mark.parametrize("options", [SGD, ADAM])
def test_nothing_is_kept_of_a_phase_that_is_finished(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Not even if the run was killed between the one and the other."""
    remove = phase_store._remove

    def remove_or_die(paths: Iterable[Path]) -> None:
        paths = list(paths)
        if any(path.exists() and ".under-way" in path.name for path in paths):
            raise KilledError
        remove(paths)

    with monkeypatch.context() as patch:
        patch.setattr(phase_store, "_remove", remove_or_die)
        killed_run(inputs, tmp_path, {**options, **ALWAYS}, PhaseKeeper, "drop", 99)
    (left,) = tmp_path.rglob("*.under-way.safetensors")
    kill_at(monkeypatch, passes, "gradient_pass")
    with pytest.raises(KilledError):
        select(inputs, tmp_path, {**options, **ALWAYS}, resume=True)
    assert not left.exists()


def test_the_state_is_kept_as_often_as_asked(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default not at all in a run of seconds."""
    saves = kill_at(monkeypatch, PhaseKeeper, "save")
    select(inputs, tmp_path, ADAM)
    assert saves == []


def keeper_of(folder: Path, minutes: float = 1.0) -> PhaseKeeper:
    """A keeper in a claimed folder."""
    run = RunFolder(folder, resume=True)
    run.claim({})
    return PhaseKeeper(run, "scores", minutes)


def test_a_keeper_is_due_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the minutes are over, counted from the start and from the end of each keeping."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    keeper = keeper_of(tmp_path, minutes=2.0)
    with PhaseLog(show=False).phase("scores", 5) as keeper.meter:
        for seconds, due in ((119.0, False), (1.0, True)):
            now[0] += seconds
            assert keeper.due() is due
        keeper.save({}, {})
        assert not keeper.due()


def test_a_keeper_hands_its_state_out_once(tmp_path: Path) -> None:
    """What it has read does not stay in memory, but what it has cost stays known."""
    keeper = keeper_of(tmp_path)
    with PhaseLog(show=False).phase("scores", 5) as keeper.meter:
        list(keeper.meter([collate(make_examples())]))
        keeper.save({"w": torch.ones(2)}, {"done": 1})
    later = keeper_of(tmp_path)
    tensors, notes = later.load() or ({}, {})
    assert torch.equal(tensors["w"], torch.ones(2))
    assert (notes["done"], notes["examples"]) == (1, 5)
    assert later.load() is None
    assert later.earlier["examples"] == 5
    later.drop()
    assert keeper_of(tmp_path).load() is None
