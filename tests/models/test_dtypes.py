"""Number types: which CPUs multiply bfloat16, and what ``auto`` is on the others."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from dualsft.models import dtypes
from dualsft.models.dtypes import settled_dtype

HAS_UNITS = dtypes.has_bfloat16_units  # before conftest's fixture says that there are some
BF16, FP32 = LlamaConfig(dtype=torch.bfloat16), LlamaConfig(dtype=torch.float32)


@pytest.mark.parametrize(
    ("capabilities", "units"),
    [
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False, "architecture": "x86_64"}, False),
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"neon": True, "bf16": True, "sve_bf16": False}, True),
        ({"neon": True, "bf16": False, "sve_bf16": False}, False),
    ],
)
def test_units_are_what_torch_says(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object], units: bool
) -> None:
    """Of AVX-512, AMX and Arm, by torch's own names."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert HAS_UNITS() == units


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux alone has it")
def test_older_releases_of_torch_leave_it_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags in /proc/cpuinfo agree with what torch says, where it says anything."""
    said = HAS_UNITS()
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert HAS_UNITS() == said


def test_auto_is_float32_where_bfloat16_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU without units, for a bfloat16 checkpoint, and unless another type is asked for."""
    assert settled_dtype(BF16, "auto", cpu=True) == "auto"
    monkeypatch.setattr(dtypes, "has_bfloat16_units", lambda: False)
    assert settled_dtype(BF16, "auto", cpu=True) == "float32"
    assert settled_dtype(BF16, "bfloat16", cpu=True) == "bfloat16"
    assert settled_dtype(BF16, "auto", cpu=False) == "auto"
    assert settled_dtype(FP32, "auto", cpu=True) == "auto"
