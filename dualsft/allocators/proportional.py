"""A quota for each tensor by its part of the positive score: quota_t ∝ Σ_{j in t} max(φ_j, 0)."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dualsft.allocators.base import ParameterAllocator, group_of
from dualsft.allocators.choice import By, Choice, check_by, own_part
from dualsft.allocators.threshold import BLOCK
from dualsft.errors import UserError
from dualsft.sharding.collectives import all_gather
from dualsft.sharding.groups import RankGroup


class Proportional(ParameterAllocator):
    """As many weights of each tensor as its part of the positive score says, the best of each.

    The sum of a tensor's positive scores is what training it alone is predicted to gain. Numbers are rounded by largest
    remainders. A tensor too small for its part is taken in full and leaves the rest to the others; those without any
    positive score come last, and if there is none at all, parts are by size. Ties go to the first name, then the first
    index.

    Args:
        by: ``signed`` ranks the weights of a tensor by φ; ``magnitude`` by |φ|.
    """

    together = True

    def __init__(self, by: By = "signed") -> None:
        check_by("proportional", by)
        self.by = by

    def allocate(self, scores: Mapping[str, Float[Tensor, "..."]], budget: int) -> dict[str, Bool[Tensor, "..."]]:
        """Exactly ``budget`` entries (see `ParameterAllocator.allocate`); refuses a score that is not finite."""
        names = sorted(scores)
        group = group_of(scores)
        gains = [_gain(name, scores[name], group) for name in names]
        if not any(gains):
            gains = [float(scores[name].numel()) for name in names]
        choice = Choice(scores, self.by)
        choice.spread([[name] for name in names], gains, budget)
        return choice.mask


def _gain(name: str, score: Float[Tensor, "..."], group: RankGroup) -> float:
    """Σ_j max(φ_j, 0), in float64; in the same order whichever ranks add up the blocks."""
    parts = score.flatten()[own_part(score.numel(), group)].split(BLOCK)
    of_ranks = all_gather([float(part.clamp(min=0).sum(dtype=torch.float64)) for part in parts], group)
    gain = sum(sum_of_block for of_rank in of_ranks for sum_of_block in of_rank)
    if not math.isfinite(gain):
        raise UserError(f"The scores of {name} hold NaN or infinity, which proportional cannot share by; score again.")
    return gain
