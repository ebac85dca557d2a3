"""The states of a run's phases, as they are kept and used."""

import re
from pathlib import Path

import pytest
import torch

from dualsft.matrix.pass_result import GradientPass
from dualsft.runs.phase_store import PhaseStore

SIZE = 2**24
"""Entries of a tensor, 64 MiB."""


def resident() -> int:
    """The bytes that the system says this process holds in memory."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found
    return int(found[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell what is resident")
def test_sums_that_have_been_used_take_no_memory(tmp_path: Path) -> None:
    """Neither as tensors nor as pages of a mapped file, while the result of their pass is kept for later steps."""
    store = PhaseStore(tmp_path)
    sums = {name: torch.ones(SIZE) for name in ("a", "b")}
    store.save("pass", *GradientPass(dict(sums)).state())
    del sums
    before = resident()
    saved = store.load("pass")
    assert saved is not None
    found = GradientPass.from_state(*saved)
    assert [float(found.sums[name].sum()) for name in found.sums] == [SIZE, SIZE]
    assert resident() - before < SIZE  # a quarter of a tensor
    assert torch.equal(found.sums["a"], torch.ones(SIZE))


def test_a_common_state_replaces_those_of_single_replicas(tmp_path: Path) -> None:
    """Each replica keeps its own of a pass that is under way; the result of all of them is one."""
    own = PhaseStore(tmp_path, of_rank=True)
    own.save("pass.under-way", {"sums": torch.ones(1)}, {})
    other = tmp_path / "pass.under-way.rank-1-of-2.safetensors"
    (kept,) = tmp_path.iterdir()
    other.write_bytes(kept.read_bytes())
    own.drop("pass")
    PhaseStore(tmp_path).save("pass", {"sums": torch.ones(1)}, {}, replaces=["pass.under-way"])
    assert [path.name for path in tmp_path.iterdir()] == ["pass.safetensors"]
