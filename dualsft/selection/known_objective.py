"""What directions use of the objective V at a scoring checkpoint, however it is kept."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

from torch import Tensor

from dualsft.matrix.sketches import Measurement
from dualsft.selection.directions import Statistics


class KnownObjective(ABC):
    """V of each validation set, whose gradients have been taken.

    Attributes:
        sets: The names of the validation sets.
        needs_pool_gradient: Whether the scorer's direction can be computed only once ḡ is known.
    """

    sets: list[str]
    needs_pool_gradient: bool

    @abstractmethod
    def measurement(self, names: Collection[str]) -> Measurement:
        """The statistics to measure of single examples, under the preconditioner."""

    @abstractmethod
    def prior_cosines(self) -> dict[str, float | None]:
        """Validation set -> the cosine of its loss's gradient with the prior's; None without a prior, or where zero."""

    @abstractmethod
    def half_gradients(self, name: str) -> list[Mapping[str, Tensor]]:
        """The gradients of V with each half of a validation set in the place of all of it; empty without halves."""

    @abstractmethod
    def statistics(
        self, pool_sums: Mapping[str, Tensor] | None, num_examples: int, occasion: str = ""
    ) -> dict[str, Statistics]:
        """Collect the statistics of each set, with passes for products with the Hessian along P ⊙ ḡ if they are needed.

        Args:
            pool_sums: Σ_i g_i by parameter name; None if it is not known yet.
            num_examples: n, how many examples it is over, or will be.
            occasion: Suffix that tells the passes' names from earlier ones'.
        """
