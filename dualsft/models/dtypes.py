"""The number types of models and of sums."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from dualsft.models.loading import Dtype

FULL_PRECISION = (None, 32, "32", "32-true")
"""The precisions of a trainer under which a model computes in the type of its weights."""


def accumulator_dtype(parameter: Tensor) -> torch.dtype:
    """The type to sum a parameter's gradients in: float32, or float64 for a float64 parameter."""
    return torch.promote_types(parameter.dtype, torch.float32)


def direction_dtype(parameter: Tensor) -> torch.dtype:
    """The type to hold a parameter's direction in during a pass: bfloat16 for bfloat16, in which products are made.

    Any other is that of sums. In float16 most of a direction would underflow.
    """
    return parameter.dtype if parameter.dtype == torch.bfloat16 else accumulator_dtype(parameter)


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 numbers itself, by AVX-512, AMX or Arm's BF16; True where nothing tells.

    Others widen the numbers before each product, several times slower than they multiply float32.
    """
    ask: Callable[[], Mapping[str, Any]] | None = getattr(torch.cpu, "get_capabilities", None)  # since torch 2.10
    if ask is not None:
        return any(found is True for name, found in ask().items() if name.endswith("bf16"))
    flags = Path("/proc/cpuinfo")
    return "bf16" in flags.read_text() if flags.exists() else True


def stored_dtype(config: "PretrainedConfig") -> torch.dtype:
    """The type that a configuration says its checkpoint is stored in; float32 where it says none."""
    found: Any = config.dtype or config.get_text_config().dtype or torch.float32
    assert isinstance(found, torch.dtype)
    return found


def settled_dtype(config: "PretrainedConfig", dtype: "Dtype", cpu: bool) -> "Dtype":
    """The type to hold a model in: float32 for ``auto`` and a bfloat16 checkpoint on a CPU without units for it.

    Args:
        config: The model's.
        dtype: What was asked for.
        cpu: Whether a CPU computes, in the type of the weights.
    """
    slow = cpu and dtype == "auto" and stored_dtype(config) == torch.bfloat16 and not has_bfloat16_units()
    return "float32" if slow else dtype
