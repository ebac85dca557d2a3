"""States of phases that are damaged on the disk."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dualsft.runs.phase_store import PhaseStore
from tests.world.damage import DAMAGE, damage_file, flipped

PHASES = ("first", "second", "third")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three states, one saved after the other."""
    store = PhaseStore(tmp_path)
    for k, phase in enumerate(PHASES):
        store.save(
            phase, {"w": torch.full((100,), float(k)), "step": torch.tensor(k), "none": torch.zeros(0)}, {"k": k}
        )
        os.utime(tmp_path / f"{phase}.safetensors", (k + 1, k + 1))
    return tmp_path


def kept(folder: Path) -> list[str]:
    """What an empty-handed process loads, in the order of phases."""
    store = PhaseStore(folder)
    found = {phase: store.load(phase) for phase in PHASES}
    for k, phase in enumerate(PHASES):
        if (state := found[phase]) is not None:
            assert (state[0]["w"] == k).all()
            assert state[1] == {"k": k}
    return [phase for phase in PHASES if found[phase] is not None]


def damage(path: Path, how: str) -> None:
    """Damage a file, and leave its time as it was."""
    time = path.stat().st_mtime
    damage_file(path, how)
    os.utime(path, (time, time))


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_state_is_dropped_with_those_after_it(
    folder: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run resumes from the states before, and says which file was damaged."""
    assert kept(folder) == [*PHASES]
    damage(folder / "second.safetensors", how)
    assert kept(folder) == ["first"]
    assert [path.name for path in folder.iterdir()] == ["first.safetensors"]
    told = capsys.readouterr().err
    assert f"{folder / 'second.safetensors'} is damaged (" in told
    assert "dropped, and computed again" in told


def test_every_byte_of_tensors_and_notes_counts(folder: Path) -> None:
    """A flipped bit anywhere in them is noticed, also one that leaves valid JSON and numbers."""
    path = folder / "third.safetensors"
    whole = path.read_bytes()
    notes = whole.index(b'k\\": 2')
    for place in [notes + 5, *range(len(whole) - 408, len(whole), 31)]:
        path.write_bytes(flipped(whole, place))
        assert PhaseStore(folder).load("third") is None, place


def test_a_state_without_a_checksum_is_loaded(folder: Path) -> None:
    """An earlier version kept none."""
    path = folder / "second.safetensors"
    with safe_open(path, "pt") as stored:
        tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118
        notes = stored.metadata()["notes"]
    save_file(tensors, path, {"notes": notes})
    assert kept(folder) == [*PHASES]
