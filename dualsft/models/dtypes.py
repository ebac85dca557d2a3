"""The types that numbers of a model are added up in."""

import torch
from torch import Tensor


def accumulator_dtype(parameter: Tensor) -> torch.dtype:
    """float32, or float64 for a float64 parameter: sums never live in half precision."""
    return torch.promote_types(parameter.dtype, torch.float32)
