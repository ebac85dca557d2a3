"""Scorers: the statistics of a parameter that a scorer gets, and the direction that it returns.

    u = (η/n) P ⊙ ( v − ½ η H (P ⊙ ḡ) )

with v = ∇V(θ) the validation gradient, ḡ the mean gradient over the n pool examples, P the optimizer's diagonal
preconditioner, η the step size and H = ∇²V(θ). Source: arXiv 2605.06166.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from dualsft.needs import Given, by_own_name

Statistic = Literal["pool_gradient", "second_moment", "empirical_fisher", "hessian_vector", "hessian_vector_difference"]
"""Statistics that a scorer may need besides the validation gradient and the preconditioner."""


@dataclass(frozen=True)
class ParameterStatistics(Given):
    """The statistics of one parameter from which its direction is computed.

    All tensors have the parameter's shape; all but the weights are float32 (float64 for float64 weights). Those that
    may be None are present if the scorer names them in its ``needs``.

    Attributes:
        name: The parameter's name.
        weight: θ, the weights at the scoring checkpoint.
        validation_gradient: v = ∇V(θ).
        preconditioner: P, a diagonal: 1 for SGD, 1/(sqrt(ĉ)+eps) for Adam.
        step_size: η, the length of the step that restricted training takes.
        num_examples: n, the number of pool examples in the mean gradient; before that is known, the number of examples
            to score, some of which may turn out not to be finite.
        pool_gradient: ḡ, the mean gradient over the pool.
        second_moment: ĉ, the bias-corrected second moment that the warm-up's Adam kept.
        empirical_fisher: The mean of the squared entries of the validation examples' gradients.
        hessian_vector: H (P ⊙ ḡ), the Hessian of V along the pool step.
    """

    asked_for: ClassVar = by_own_name("pool_gradient", "second_moment", "empirical_fisher", "hessian_vector")

    name: str
    weight: Float[Tensor, "*shape"]
    validation_gradient: Float[Tensor, "*shape"]
    preconditioner: Float[Tensor, "*shape"]
    step_size: float
    num_examples: int
    pool_gradient: Float[Tensor, "*shape"] | None = None
    second_moment: Float[Tensor, "*shape"] | None = None
    empirical_fisher: Float[Tensor, "*shape"] | None = None
    hessian_vector: Float[Tensor, "*shape"] | None = None


class Scorer(ABC):
    """A rule for the direction u, applied to one parameter at a time.

    Attributes:
        needs: What ``direction`` uses besides the validation gradient and the preconditioner; a scorer with options may
            set it in its constructor. With ``pool_gradient``, or a product with the Hessian along the pool step, the
            pool is passed twice: once for ḡ, which gives the parameter scores too, and once for the example scores.
            Otherwise one pass gives both.
    """

    needs: tuple[Statistic, ...] = ()

    @abstractmethod
    def direction(self, statistics: ParameterStatistics) -> Float[Tensor, "*shape"]:
        """The direction u for one parameter, of its shape; the same at every call with the same statistics.

        An example's utility is then <u, g_i> and a weight's importance u_j Σ_i g_ij: positive where training on the
        example, or training the weight, is predicted to lower the validation objective.
        """


class SecondOrderScorer(Scorer):
    """A scorer whose direction has the quadratic term; a subclass only defines its estimate of H (P ⊙ ḡ).

    The mean gradient ḡ of the pool is always available to it.
    """

    @abstractmethod
    def curvature(self, statistics: ParameterStatistics) -> Float[Tensor, "*shape"]:
        """H (P ⊙ ḡ) for one parameter, of its shape, without the factor η."""

    def direction(self, statistics: ParameterStatistics) -> Float[Tensor, "*shape"]:
        """(η/n) P ⊙ (v − ½ η H (P ⊙ ḡ)), of the parameter's shape."""
        s = statistics
        slope = s.validation_gradient - (s.step_size / 2) * self.curvature(s)
        return (s.step_size / s.num_examples) * s.preconditioner * slope
