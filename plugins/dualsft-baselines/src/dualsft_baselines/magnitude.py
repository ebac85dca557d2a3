"""argtop_j |θ_j| over the whole model, or the smallest.

Smallest: Liao, Meng, Monz, "Parameter-Efficient Fine-Tuning without Introducing New Latency" (PaFi), arXiv 2305.16742
(2023). Largest: the usual baseline of magnitude-based sparse fine-tuning, among others in arXiv 2506.00772.
"""

from typing import Literal

import torch
from torch import Tensor

from dualsft import ParameterAllocator, ScoredParameters, UserError
from dualsft_baselines.ranking import largest_entries


class Magnitude(ParameterAllocator):
    """The weights that are largest or smallest by |θ| over the whole model (smallest: PaFi, arXiv 2305.16742).

    Ties go to the first name, then the first index.

    Args:
        keep: largest or smallest.
    """

    needs = ("weight",)

    def __init__(self, keep: Literal["largest", "smallest"] = "largest") -> None:
        if keep not in ("largest", "smallest"):
            raise UserError(f"magnitude keeps the 'largest' or the 'smallest' weights, not the {keep!r}.")
        self.keep = keep

    def allocate(self, scores: ScoredParameters, budget: int) -> dict[str, Tensor]:
        """Exactly ``budget`` entries: parameter name -> bool, of its shape."""
        weights = scores.weight
        assert weights is not None
        sign = 1 if self.keep == "largest" else -1
        return largest_entries(scores, lambda name: sign * wide(weights[name]).abs(), budget)


def wide(weight: Tensor) -> Tensor:
    """In float32 at least."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
