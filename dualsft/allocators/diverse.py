"""Examples that together represent the useful part of the pool: greedy facility location on sketched gradients.

    F(A) = Σ_i w_i max_{k ∈ A} s_ik      s_ik = max(0, cos(√P ⊙ g_i, √P ⊙ g_k))      w_i = max(0, φ_i)

An example counts with its score times its similarity to the nearest chosen example, so a second example of the same
kind adds little. F is monotone and submodular, and the greedy choice reaches at least 1 − 1/e of the optimum
(Nemhauser, Wolsey, Fisher 1978); facility location on gradients: Mirzasoleiman, Bilmes, Leskovec, "Coresets for
Data-efficient Training of Machine Learning Models", arXiv 1906.01827. An example's gain can only fall as others are
chosen, so its last known gain is an upper bound, and most gains are never computed again (Minoux 1978).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from dualsft.allocators.base import DataAllocator, ScoredExamples
from dualsft.errors import UserError

_BLOCK = 32  # gains that are computed at once


class Diverse(DataAllocator):
    """Examples of high score whose gradients differ: greedy facility location on sketches, weighted by the score.

    Examples without a positive score, and those that add nothing, follow by score. Time grows with the square of the
    number of examples with a positive score.
    """

    needs = ("sketch",)

    def allocate(self, examples: ScoredExamples, budget: int) -> Int[Tensor, " chosen"]:
        """Exactly ``budget`` examples (see `DataAllocator.allocate`); refuses a sketch that is not finite."""
        assert examples.sketch is not None
        if not bool(examples.sketch.isfinite().all()):
            raise UserError("The sketches hold NaN or infinity, which diverse cannot compare; take another allocator.")
        positive = (examples.score > 0).nonzero().squeeze(1)
        # a row of zeros stays zero: it is similar to no example
        units = normalize(examples.sketch[positive].double(), eps=torch.finfo(torch.float64).tiny).float()
        picked = positive[_greedy(units, examples.score[positive].double(), budget)]
        left = torch.ones(len(examples.score), dtype=torch.bool)
        left[picked] = False
        by_score = torch.sort(examples.score, descending=True, stable=True).indices
        chosen = torch.cat([picked, by_score[left[by_score]]])[:budget]
        return examples.example_id[chosen].sort().values


def _greedy(
    units: Float[Tensor, "example sketch"], worth: Float[Tensor, " example"], count: int
) -> Int[Tensor, " picked"]:
    """Pick rows (of length one) greedily until there are ``count`` or none adds anything; worth is w_i > 0."""
    covered = torch.zeros_like(worth)
    bounds = torch.full_like(worth, torch.inf)
    picked: list[int] = []
    while len(picked) < min(count, len(worth)):
        stale = torch.ones(len(worth), dtype=torch.bool)
        stale[picked] = False
        best = _refresh(units, worth, covered, bounds, stale)
        if not bounds[best] > 0:
            break
        picked.append(best)
        bounds[best] = -torch.inf
        covered = torch.maximum(covered, _likeness(units, torch.tensor([best]))[0])
    return torch.tensor(picked, dtype=torch.int64)


def _refresh(units: Tensor, worth: Tensor, covered: Tensor, bounds: Tensor, stale: Tensor) -> int:
    """Compute gains until the highest exceeds all bounds that are left; return its row, the first of equals."""
    best = -torch.inf
    while bool(stale.any()):
        candidates = torch.where(stale, bounds, -torch.inf)
        if float(candidates.max()) < best:
            break
        block = candidates.topk(min(_BLOCK, int(stale.sum()))).indices
        gains = ((_likeness(units, block) - covered).clamp_(min=0) * worth).sum(1)
        bounds[block], stale[block] = gains, False
        best = max(best, float(gains.max()))
    fresh = torch.where(stale, -torch.inf, bounds)
    return int((fresh == fresh.max()).nonzero()[0])


def _likeness(units: Tensor, block: Tensor) -> Float[Tensor, "candidate example"]:
    """s_ik of some candidates k with all examples i; s_kk is set to exactly one, or zero for a row of zeros."""
    likeness = (units[block] @ units.t()).double().clamp_(0, 1)
    likeness[torch.arange(len(block)), block] = (units[block].abs().sum(1) > 0).double()
    return likeness
