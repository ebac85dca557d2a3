"""Top-k allocators: they choose the highest scores, or the lowest in reverse."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dualsft.allocators.base import DataAllocator, ParameterAllocator, ScoredExamples
from dualsft.allocators.choice import By, Choice, check_by


class GlobalTopK(ParameterAllocator):
    """The weights with the highest scores over the whole model; ties go to the first name, then the first index.

    Args:
        by: ``magnitude`` ranks by |φ|, as the paper's release does; ``signed`` by φ itself.
        reverse: Choose the lowest instead, to see what the ranking is worth.
    """

    together = True

    def __init__(self, by: By = "magnitude", reverse: bool = False) -> None:
        check_by("global_top_k", by)
        self.by, self.reverse = by, reverse

    def allocate(self, scores: Mapping[str, Float[Tensor, "..."]], budget: int) -> dict[str, Bool[Tensor, "..."]]:
        """Exactly ``budget`` entries; see `ParameterAllocator.allocate`."""
        choice = Choice(scores, self.by, self.reverse)
        choice.take(scores, budget)
        return choice.mask


class TopK(DataAllocator):
    """The examples with the highest scores; ties go to the earlier row.

    Args:
        reverse: Choose the lowest instead, to see what the ranking is worth.
    """

    def __init__(self, reverse: bool = False) -> None:
        self.reverse = reverse

    def allocate(self, examples: ScoredExamples, budget: int) -> Int[Tensor, " chosen"]:
        """Exactly ``budget`` examples; see `DataAllocator.allocate`."""
        order = torch.sort(examples.score, descending=not self.reverse, stable=True).indices
        return examples.example_id[order[:budget]].sort().values
