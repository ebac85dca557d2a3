"""As many examples as the budget allows, all with a positive score."""

import torch
from jaxtyping import Int
from torch import Tensor

from dualsft.allocators.base import DataAllocator, ScoredExamples, check_any_positive


class PositiveOnly(DataAllocator):
    """The examples with the highest scores, at most the budget, none that is not positive; ties to the earlier row."""

    exact = False

    def allocate(self, examples: ScoredExamples, budget: int) -> Int[Tensor, " chosen"]:
        """At most ``budget`` examples; see `DataAllocator.allocate`.

        Raises:
            UserError: if no score is positive.
        """
        score = examples.score
        check_any_positive("positive_only", score)
        count = min(budget, int((score > 0).sum()))
        order = torch.sort(score, descending=True, stable=True).indices
        return examples.example_id[order[:count]].sort().values
