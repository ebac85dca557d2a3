"""u = (η/n) P ⊙ (v − ½ η H (P ⊙ ḡ)), with the true Hessian H = ∇²V(θ) along the pool step. Source: arXiv 2605.06166."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from dualsft.errors import UserError
from dualsft.scorers.base import ParameterStatistics, SecondOrderScorer

Method = Literal["exact", "finite_difference"]


class HessianVector(SecondOrderScorer):
    """Second order with the true Hessian of the validation objective along the pool step.

    Args:
        method: exact differentiates twice; finite_difference takes the central difference of two gradients, for models
            that cannot be differentiated twice, with weights in float32.
    """

    def __init__(self, method: Method = "exact") -> None:
        if method not in ("exact", "finite_difference"):
            raise UserError(f"hessian_vector's method is 'exact' or 'finite_difference', not {method!r}.")
        self.method = method
        self.needs = ("hessian_vector" if method == "exact" else "hessian_vector_difference",)

    def curvature(self, statistics: ParameterStatistics) -> Float[Tensor, "*shape"]:
        """H (P ⊙ ḡ), of the parameter's shape."""
        assert statistics.hessian_vector is not None
        return statistics.hessian_vector
