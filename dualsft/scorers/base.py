"""What a scorer is given and what it gives back."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

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
    """

    name: str
    weight: Float[Tensor, "*shape"]
    validation_gradient: Float[Tensor, "*shape"]
    preconditioner: Float[Tensor, "*shape"]
    step_size: float
    num_examples: int


class Scorer(ABC):
    """A rule for the direction u, applied to one parameter at a time."""

    @abstractmethod
    def direction(self, statistics: ParameterStatistics) -> Float[Tensor, "*shape"]:
        """U for one parameter, of its shape.

        An example's utility is then <u, g_i> and a weight's importance u_j Σ_i g_ij: positive where training on the
        example, or training the weight, is predicted to lower the validation objective.
        """
