"""As many examples as the budget allows, but none whose score speaks against it."""

import torch
from jaxtyping import Int
from torch import Tensor

from dualsft.allocators.base import DataAllocator, ScoredExamples
from dualsft.errors import UserError


class PositiveOnly(DataAllocator):
    """The examples with the highest scores, at most the budget, none that is not positive; ties to the earlier row."""

    exact = False

    def allocate(self, examples: ScoredExamples, budget: int) -> Int[Tensor, " chosen"]:
        """At most ``budget`` examples; see `DataAllocator.allocate`.

        Raises:
            UserError: if no score is positive.
        """
        score = examples.score
        count = min(budget, int((score > 0).sum()))
        if not count:
            raise UserError(
                f"None of the {len(score):,} examples of data.train that could be scored has a positive score, and "
                "positive_only takes no others; choose another model.data_allocator."
            )
        order = torch.sort(score, descending=True, stable=True).indices
        return examples.example_id[order[:count]].sort().values
