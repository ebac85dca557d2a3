"""u = (η/n) P ⊙ v: the gain of one preconditioned gradient step on the pool, to first order.

Source: arXiv 2605.06166; the quadratic term −½ η H (P ⊙ ḡ) of the full direction is dropped.
"""

from jaxtyping import Float
from torch import Tensor

from dualsft.scorers.base import ParameterStatistics, Scorer


class FirstOrder(Scorer):
    """First-order utility: how well a gradient agrees with the validation gradient, u = (η/n) P ⊙ v."""

    def direction(self, statistics: ParameterStatistics) -> Float[Tensor, "*shape"]:
        """(η/n) P ⊙ v, of the parameter's shape."""
        s = statistics
        return (s.step_size / s.num_examples) * s.preconditioner * s.validation_gradient
