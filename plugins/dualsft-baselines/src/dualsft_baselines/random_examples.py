"""Every subset of the budget's size is equally likely: what any choice of examples must beat."""

import torch
from torch import Tensor

from dualsft import DataAllocator, ScoredExamples
from dualsft_baselines.sampling import random_entries


class RandomExamples(DataAllocator):
    """Random examples, uniformly without replacement: the control of every data selection.

    Args:
        seed: Another seed draws other examples.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def allocate(self, examples: ScoredExamples, budget: int) -> Tensor:
        """Exactly ``budget`` ids, ascending."""
        generator = torch.Generator().manual_seed(self.seed)
        return examples.example_id[random_entries(len(examples.example_id), budget, generator)]
