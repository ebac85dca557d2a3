"""Which weights the parameter budget buys."""

import torch
from torch import Tensor

from dualsft import ParameterAllocator, ScoredParameters


class MyWeights(ParameterAllocator):
    """The weights with the largest |φ_j| of the whole model; ties go to the first name, then the first index."""

    def allocate(self, scores: ScoredParameters, budget: int) -> dict[str, Tensor]:
        """Parameter name -> which of its entries are chosen, of its shape; ``budget`` in all."""
        names = sorted(scores)
        flat = torch.cat([scores[name].abs().flatten() for name in names])
        chosen = torch.zeros(len(flat), dtype=torch.bool)
        chosen[flat.argsort(descending=True, stable=True)[:budget]] = True
        parts = chosen.split([scores[name].numel() for name in names])
        return {name: part.view_as(scores[name]) for name, part in zip(names, parts, strict=True)}
