"""The number types of sums."""

import torch
from torch import Tensor


def accumulator_dtype(parameter: Tensor) -> torch.dtype:
    """The type to sum a parameter's gradients in: float32, or float64 for a float64 parameter."""
    return torch.promote_types(parameter.dtype, torch.float32)
