"""A selection goes on: where it was killed, on other ranks; on shards where memory ran out, with batches in halves."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from dualsft.runs.phase_store import PhaseStore
from dualsft.selection import Warmup, load_selection
from dualsft.selection.prior import Prior
from dualsft.sharding.groups import rank
from dualsft.sharding.strategy import FSDP2
from tests.sharding.test_select import WALK, assert_same
from tests.world.data import sums
from tests.world.faults import SHORTAGES, Shortage
from tests.world.jobs import ADAM, Inputs, select, trainer, write_inputs
from tests.world.ranks import run_on_ranks

pytestmark = pytest.mark.heavy

EXACT = 1e-10
RUNS: dict[str, dict[str, Any]] = {
    "one checkpoint": {
        "dtype": "float64",
        "warmup": Warmup(fraction=0.5, epochs=2, learning_rate=1e-3, keep=True),
        "prior": Prior(weight=0.5, fraction=0.5),
        "stability": True,
        "token_scores": True,
    },
    "a path": {**ADAM, "dtype": "float64", "path": replace(WALK, columns="product")},
}
RANKS: dict[str, dict[str, Any]] = {
    "two shards": {"strategy": FSDP2, "devices": 2},
    "three shards": {"strategy": FSDP2, "devices": 3},
    "two replicas": {"strategy": "ddp", "devices": 2},
    "one process": {"devices": 1},
}


def go_on(inputs: Inputs, folder: Path, name: str, ranks: dict[str, Any], last: int = 0) -> int:
    """A selection, from whatever an earlier one left; how many finished states this rank keeps.

    Rank zero dies as soon as it has kept its last one.
    """
    save, kept = PhaseStore.save, 0

    def save_and_die(self: PhaseStore, phase: str, *arguments: Any, **options: Any) -> None:
        nonlocal kept
        save(self, phase, *arguments, **options)
        kept += not phase.endswith("under-way")
        if kept == last and rank() == 0:
            os._exit(1)

    ranks = {key: value() if isinstance(value, type) else value for key, value in ranks.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PhaseStore, "save", save_and_die)
        select(inputs, folder, RUNS[name], {"batch_tokens": 60}, ranks=ranks, resume=(folder / ".unfinished").exists())
    return kept


@dataclass(frozen=True)
class Unbroken:
    """What selections are made from, what one process makes of each, and how many finished states it keeps."""

    inputs: Inputs
    folder: Path
    states: dict[str, int]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """The selections that nobody has killed."""
    folder, rows = tmp_path_factory.mktemp("unbroken"), sums(16)
    inputs = write_inputs(folder, rows, rows[-6:])
    return Unbroken(inputs, folder, {name: go_on(inputs, folder / name, name, {"devices": 1}) for name in RUNS})


@pytest.mark.parametrize(
    ("name", "share", "before", "after"),
    [
        ("one checkpoint", 0.3, "two shards", "three shards"),
        ("one checkpoint", 0.7, "three shards", "one process"),
        ("one checkpoint", 1.0, "two shards", "two replicas"),
        ("a path", 0.5, "two replicas", "two shards"),
    ],
)
def test_a_killed_run_goes_on(
    unbroken: Unbroken, tmp_path: Path, name: str, share: float, before: str, after: str
) -> None:
    """To the scores of one process that nobody has killed, repeating no phase that was finished."""
    out, states = tmp_path / "out", unbroken.states[name]
    with pytest.raises(AssertionError, match=r"died without a word|[Cc]onnection (closed|reset) by peer"):
        on(before, unbroken.inputs, out, name, round(share * states))
    assert on(after, unbroken.inputs, out, name) <= states - round(share * states) + 1
    assert_same(load_selection(out), load_selection(unbroken.folder / name), EXACT)
    assert not (out / ".unfinished").exists() or not [*(out / ".unfinished").glob("*.s*")]


def on(ranks: str, *arguments: Any) -> int:
    """`go_on` with such ranks; what rank zero gives."""
    inputs, folder, name, *last = arguments
    kept: int = run_on_ranks(RANKS[ranks]["devices"], go_on, inputs, folder, name, RANKS[ranks], *last)[0]
    return kept


SHORT: dict[str, Any] = {"dtype": "float64", "warmup": Warmup(fraction=0.5, epochs=2, learning_rate=1e-3)}


def short_of_memory(inputs: Inputs, folder: Path, times: tuple[int, ...], backward: bool) -> int:
    """A selection on two shards in which rank 1 runs out of memory when its model runs for one of these times.

    The selection goes on if an earlier one left something. How often the model ran.
    """
    trap = Shortage(SHORTAGES["accelerator"], *(times if rank() == 1 else ()), backward=backward)
    module = trap.module()(inputs.model, **SHORT)
    resume = (folder / ".unfinished").exists()
    on_two = trainer(strategy=FSDP2(), devices=2)
    on_two.select(module, inputs.data(batch_size=3), str(folder), resume=resume)
    return trap.runs


def test_a_shard_that_is_out_of_memory_has_all_take_halves(tmp_path: Path) -> None:
    """When the job is resumed: of the warm-up's batches, some with fewer rows than two to a rank, and of a pass's."""
    inputs = write_inputs(tmp_path)
    expected = select(inputs, tmp_path / "alone", SHORT, {"batch_size": 3})
    steps = run_on_ranks(2, short_of_memory, inputs, tmp_path / "enough", (), False)[1]
    for name, run, backward, told in (("warm-up", 2, True, "in halves"), ("scores", steps, False, "of 50 tokens")):
        folder = tmp_path / name
        with pytest.raises(
            AssertionError, match=rf"ran out in the {name} .*; go on with --resume on as many ranks, .*{told}"
        ):
            run_on_ranks(2, short_of_memory, inputs, folder, (run,), backward)
        run_on_ranks(2, short_of_memory, inputs, folder, (), False)
        found = load_selection(folder)
        assert_same(found, expected, EXACT)
        assert found.manifest["scoring_batch_tokens"] == (50 if name == "scores" else 100)
