"""argtop_i ‖g_i‖, with g_i the gradient of example i's loss over all weights.

In the spirit of GraNd, the expected norm early in training: Paul, Ganguli, Dziugaite, "Deep Learning on a Data Diet",
arXiv 2107.07075 (2021). What differs: the norm is taken once, at the scoring checkpoint of a pre-trained model, and not
averaged over initialisations.
"""

from torch import Tensor

from dualsft import DataAllocator, ScoredExamples
from dualsft_baselines.ranking import largest_examples


class GradientNorm(DataAllocator):
    """The examples with the largest gradients ‖g_i‖, in the spirit of GraNd (Data Diet, arXiv 2107.07075).

    Ties go to the earlier row.

    Args:
        reverse: Choose the smallest instead.
    """

    needs = ("gradient_norm",)

    def __init__(self, reverse: bool = False) -> None:
        self.reverse = reverse

    def allocate(self, examples: ScoredExamples, budget: int) -> Tensor:
        """Exactly ``budget`` ids, ascending."""
        assert examples.gradient_norm is not None
        return largest_examples(examples, examples.gradient_norm, budget, self.reverse)
