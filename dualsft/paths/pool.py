"""The path of the warm-up: the run's scorer at several of its checkpoints, added up.

With the scorer first_order it is TracIn (Pruthi, Liu, Sundararajan, Kale, arXiv 2002.08484) with Adam's preconditioner,
for weights as well as for examples.
"""

from jaxtyping import Float
from torch import Tensor

from dualsft.paths.base import Piece, ScoringPath


class PoolPath(ScoringPath):
    """The warm-up's own path, u_k by the run's scorer at the end of each piece: scores of several checkpoints."""

    trains_on = "pool"
    needs = ("scorer_direction",)

    def direction(self, piece: Piece) -> Float[Tensor, "*shape"]:
        """The direction of the run's scorer at θ_{k+1}."""
        assert piece.scorer_direction is not None
        return piece.scorer_direction
