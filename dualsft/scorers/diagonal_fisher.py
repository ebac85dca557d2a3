"""u = (η/n) P ⊙ (v − ½ η c ⊙ P ⊙ ḡ): the Hessian approximated by a diagonal, H ≈ diag(c). Source: arXiv 2605.06166.

Near a minimum of a likelihood the Hessian is close to the Fisher information, whose diagonal is the expected square of
the gradient. Both sources of c estimate it, but of different gradients:

    second_moment      ĉ of the warm-up's Adam: the running mean of the squared gradient of a *batch of the pool*, so of
                       another loss than V, and smaller than that of single examples as noise averages out in a batch.
                       It costs nothing; the paper's release uses it.
    empirical_fisher   the mean over the *validation examples* of the squared gradient of l_i, an example's mean loss
                       per token. As the gradients of an example's T tokens partly cancel in that mean, it is below the
                       curvature, by up to the factor T. It costs a backward pass for each validation example.
"""

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from dualsft.errors import UserError
from dualsft.scorers.base import ParameterStatistics, SecondOrderScorer

Source = Literal["second_moment", "empirical_fisher"]


class DiagonalFisher(SecondOrderScorer):
    """Second order with a diagonal curvature: the Fisher information's, from squared gradients.

    Args:
        source: second_moment takes it from the warm-up's Adam, empirical_fisher from the validation examples.
        scale: Factor of c. Adam's second moment is corrected for its start from zero; 1 − 0.999^t takes the correction
            of t steps back, and leaves the running mean as Adam keeps it, which the paper's release takes.
    """

    def __init__(self, source: Source = "second_moment", scale: float = 1.0) -> None:
        if source not in ("second_moment", "empirical_fisher"):
            raise UserError(
                f"diagonal_fisher takes its curvature from 'second_moment' or 'empirical_fisher', not from {source!r}."
            )
        if not 0 < scale < math.inf:
            raise UserError(f"scale of diagonal_fisher is {scale}; give a positive number.")
        self.source, self.scale = source, scale
        self.needs = ("pool_gradient", source)

    def curvature(self, statistics: ParameterStatistics) -> Float[Tensor, "*shape"]:
        """The product c ⊙ P ⊙ ḡ, of the parameter's shape, times the scale."""
        s = statistics
        c = s.second_moment if self.source == "second_moment" else s.empirical_fisher
        assert c is not None
        assert s.pool_gradient is not None
        return self.scale * c * s.preconditioner * s.pool_gradient
