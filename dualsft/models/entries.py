"""Entries of a tensor by flat index."""

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


@torch.no_grad()
def set_entries(tensor: Shaped[Tensor, "..."], index: Int[Tensor, " entry"], values: Shaped[Tensor, " entry"]) -> None:
    """Set the entries of a tensor at flat indices, all different, counted row by row however it lies in memory.

    ``put_`` would do the same, but has no deterministic form, and takes int64 indices only.
    """
    flat = tensor.flatten()  # a view of a contiguous tensor, else a copy
    flat.scatter_(0, index, values)
    if not tensor.is_contiguous():
        tensor.copy_(flat.view(tensor.shape))
