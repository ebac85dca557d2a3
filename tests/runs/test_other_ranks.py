"""States that another number of ranks has left, as a process finds them."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dualsft.runs.joined_state import JoinedState
from dualsft.runs.phase_store import PhaseStore
from dualsft.runs.state_file import StateName, write_state
from dualsft.sharding.shards import rows_of_rank
from tests.world.damage import damage_file

WHOLE = {
    "sum:a": torch.arange(14.0).view(7, 2),
    "column:0:b": torch.arange(2),  # fewer rows than ranks
    "weight:c": torch.zeros(0, 3),
    "moment:d": torch.arange(24, dtype=torch.bfloat16).view(12, 2),
    "row:0": torch.arange(5, dtype=torch.float64),  # of examples, which all ranks have
}


def part(rank: int, ranks: int) -> dict[str, Tensor]:
    """A rank's tensors of the whole."""
    own = {name: rows_of_rank(len(tensor), rank, ranks) for name, tensor in WHOLE.items()}
    return {n: t if n == "row:0" else t[own[n].start : own[n].stop].contiguous() for n, t in WHOLE.items()}


def leave(folder: Path, ranks: int, version: int, seconds: int, of: Sequence[int] | None = None) -> list[Path]:
    """What ranks have left of a state that they saved at a time, all of them or some."""
    files = []
    for rank in range(ranks) if of is None else of:
        name = StateName("pass", version, rank, ranks) if ranks > 1 else StateName("pass")
        write_state(folder / str(name), part(rank, ranks), {"version": version})
        os.utime(folder / str(name), (seconds, seconds))
        files.append(folder / str(name))
    return files


@pytest.mark.parametrize("before", [1, 2, 3, 11])
def test_every_rank_is_given_its_rows(tmp_path: Path, before: int) -> None:
    """For any number of ranks before and now."""
    files = leave(tmp_path, before, 1, 1)
    for now in (1, 2, 5):
        for rank in range(now):
            found, expected = JoinedState(files, rank, now), part(rank, now)
            assert set(found) == set(expected)
            for name, tensor in expected.items():
                assert found[name].dtype == tensor.dtype
                assert torch.equal(found[name], tensor), (name, rank, now)


def version_of(folder: Path) -> int | None:
    """Which state a single process finds."""
    found = PhaseStore(folder).load("pass")
    return None if found is None else int(found[1]["version"])


def test_the_latest_complete_state_counts(tmp_path: Path) -> None:
    """Whoever has saved it; what it replaces goes with all its parts, and other phases stay."""
    leave(tmp_path, 3, 1, seconds=10)
    leave(tmp_path, 3, 2, seconds=40, of=[0, 2])  # a kill came before the state was complete
    assert version_of(tmp_path) == 1
    leave(tmp_path, 1, 3, seconds=20)
    assert version_of(tmp_path) == 3
    leave(tmp_path, 2, 4, seconds=30)
    assert version_of(tmp_path) == 4
    store = PhaseStore(tmp_path)
    store.save("other", {}, {})
    store.save("pass", {}, {"version": 5})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.safetensors", "pass.safetensors"]
    assert version_of(tmp_path) == 5


def test_a_damaged_part_is_dropped_with_what_rests_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The state before it is found, and what was saved before that stays."""
    PhaseStore(tmp_path).save("earlier", {}, {})
    os.utime(tmp_path / "earlier.safetensors", (1, 1))
    leave(tmp_path, 2, 1, seconds=10)
    _, second = leave(tmp_path, 3, 2, seconds=20, of=[0, 1])
    leave(tmp_path, 3, 2, seconds=30, of=[2])
    PhaseStore(tmp_path).save("later", {}, {})
    damage_file(second, "flipped")
    os.utime(second, (20, 20))
    assert version_of(tmp_path) == 1
    assert f"{second} is damaged" in capsys.readouterr().err
    left = {name.phase for path in tmp_path.iterdir() if (name := StateName.of(path))}
    assert left == {"earlier", "pass"}


def test_what_is_under_way_is_taken_up_by_as_many_ranks_alone(tmp_path: Path) -> None:
    """A rank's batches are others among others."""
    leave(tmp_path, 2, 1, seconds=10)
    assert PhaseStore(tmp_path).load_own("pass") is None
    PhaseStore(tmp_path).drop("pass")
    assert [*tmp_path.iterdir()] == []
