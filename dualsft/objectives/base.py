"""A term of V(θ) = mean validation loss + Σ_t λ_t mean_i L_t,i(θ), beside the validation loss."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from dualsft.data.layout import Batch, Layout
from dualsft.models import PreTrainedModel


class Objective(ABC):
    """A further term of the objective that a selection is to lower: λ times the mean loss over some pool examples.

    Attributes:
        name: Its name in the log; no two terms of a run may share it.
        weight: λ, its weight beside the validation loss's 1; with 0 the term is left out.
        needs_teacher: Whether the losses compare the model with the untouched base model.
    """

    name: ClassVar[str]
    weight: float
    needs_teacher: ClassVar[bool] = False

    @abstractmethod
    def draw(self, pool: Sequence[int], seed: int) -> list[int]:
        """The ids of the pool examples that the mean is over, at least one.

        Args:
            pool: Ids of the examples that have a response, ascending.
            seed: The run's.
        """

    @abstractmethod
    def losses(
        self, model: PreTrainedModel, batch: Batch, layout: Layout, teacher: PreTrainedModel | None
    ) -> Float[Tensor, " example"]:
        """L_i of each example of the batch, differentiable in the model's weights (twice, for the exact Hessian).

        Args:
            model: The model.
            batch: Padded or packed examples, on the model's device.
            layout: Which tokens belong to which example; ``layout.by_example`` brings values of tokens to examples.
            teacher: The base model; None unless ``needs_teacher``.
        """
