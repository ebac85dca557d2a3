"""What a scorer is given and what it gives back."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ParameterStatistics:
    """What is known of one parameter when its direction is chosen; all tensors have the parameter's shape.

    Attributes:
        name: The parameter's name.
        weight: θ, the weights at the scoring checkpoint.
        validation_gradient: v = ∇V(θ), float32.
        preconditioner: P, a diagonal: 1 for SGD, 1/(sqrt(ĉ)+eps) for Adam; float32.
        step_size: η, the length of the step that restricted training takes.
        num_examples: n, how many pool examples are scored.
        pool_gradient: ḡ, the mean gradient over the pool, for a scorer that needs it; float32.
    """

    name: str
    weight: Float[Tensor, "*shape"]
    validation_gradient: Float[Tensor, "*shape"]
    preconditioner: Float[Tensor, "*shape"]
    step_size: float
    num_examples: int
    pool_gradient: Float[Tensor, "*shape"] | None = None


class Scorer(ABC):
    """A rule for the direction u, applied to one parameter at a time.

    Attributes:
        needs_pool_gradient: Whether u depends on ḡ. If so the pool is passed twice, once for ḡ, which gives the
            parameter scores, and once for the example scores; otherwise one pass gives both.
    """

    needs_pool_gradient: ClassVar[bool] = False

    @abstractmethod
    def direction(self, statistics: ParameterStatistics) -> Float[Tensor, "*shape"]:
        """U for one parameter, of its shape.

        An example's utility is then <u, g_i> and a weight's importance u_j Σ_i g_ij: positive where training on the
        example, or training the weight, is predicted to lower the validation objective.
        """
