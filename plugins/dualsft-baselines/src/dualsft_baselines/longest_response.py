"""argtop_i T_i, with T_i the number of supervised tokens of example i.

Source: Zhao, Andriushchenko, Croce, Flammarion, "Long Is More for Alignment", arXiv 2402.04833 (2024): the 1,000
longest responses of an instruction data set make a strong baseline.
"""

from torch import Tensor

from dualsft import DataAllocator, ScoredExamples
from dualsft_baselines.ranking import largest_examples


class LongestResponse(DataAllocator):
    """The examples with the longest responses, in supervised tokens (Long Is More for Alignment, arXiv 2402.04833).

    Ties go to the earlier row.
    """

    def allocate(self, examples: ScoredExamples, budget: int) -> Tensor:
        """Exactly ``budget`` ids, ascending."""
        return largest_examples(examples, examples.num_tokens, budget)
