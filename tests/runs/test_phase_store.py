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
    store = PhaseStore(tmp_path)
    store.save("pass.under-way", {"sums": torch.ones(1)}, {})
    (kept,) = tmp_path.iterdir()
    for place in (".rank-0-of-2", ".rank-1-of-2", ".replica-1-of-2@3.rank-0-of-2"):
        kept.with_name(f"pass.under-way{place}.safetensors").write_bytes(kept.read_bytes())
    kept.unlink()
    store.drop("pass")
    assert len([*tmp_path.iterdir()]) == 3
    store.save("pass", {"sums": torch.ones(1)}, {}, replaces=["pass.under-way"])
    assert [path.name for path in tmp_path.iterdir()] == ["pass.safetensors"]
