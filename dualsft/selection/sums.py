"""Sums of gradients that lie on disk once their pass is over, and what is made of them one parameter at a time."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor


class WeightedSums(Mapping[str, Tensor]):
    """Parameter name -> Σ_t c_t G_t, on the device where it is to be used, made when it is asked for.

    Args:
        parts: c_t and G_t, the latter by parameter name, on the host (in files) or anywhere.
        device: Where the result goes.
    """

    def __init__(self, parts: Sequence[tuple[float, Mapping[str, Tensor]]], device: torch.device) -> None:
        self._parts, self._device = parts, device

    def __getitem__(self, name: str) -> Tensor:
        (first, sums), *others = self._parts
        total = sums[name].to(self._device) * first
        for weight, sums in others:
            total.add_(sums[name].to(self._device), alpha=weight)
        return total

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts[0][1])

    def __len__(self) -> int:
        return len(self._parts[0][1])
