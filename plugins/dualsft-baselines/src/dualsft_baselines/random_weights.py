"""Every mask of the budget's size is equally likely: what any choice of weights must beat."""

import torch
from torch import Tensor

from dualsft import ParameterAllocator, ScoredParameters
from dualsft_baselines.sampling import random_entries


class RandomWeights(ParameterAllocator):
    """Random weights, uniformly over the whole model without replacement: the control of every sparse fine-tune.

    Args:
        seed: Another seed draws other weights.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def allocate(self, scores: ScoredParameters, budget: int) -> dict[str, Tensor]:
        """Exactly ``budget`` entries: parameter name -> bool, of its shape."""
        shapes = {name: scores[name].shape for name in sorted(scores)}
        sizes = [shape.numel() for shape in shapes.values()]
        chosen = random_entries(sum(sizes), budget, torch.Generator().manual_seed(self.seed))
        return {name: part.view(shapes[name]) for name, part in zip(shapes, chosen.split(sizes), strict=True)}
