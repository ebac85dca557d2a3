"""As many examples as the budget allows, all with a positive score."""

from jaxtyping import Int
from torch import Tensor

from dualsft.allocators.base import DataAllocator, ScoredExamples, check_any_positive
from dualsft.allocators.top_k import TopK


class PositiveOnly(DataAllocator):
    """The examples with the highest scores, at most the budget, none that is not positive; ties to the earlier row."""

    exact = False

    def allocate(self, examples: ScoredExamples, budget: int) -> Int[Tensor, " chosen"]:
        """At most ``budget`` examples (see `DataAllocator.allocate`); refuses scores without a positive one."""
        check_any_positive("positive_only", examples.score)
        return TopK().allocate(examples, min(budget, int((examples.score > 0).sum())))
