"""argtop_j |W_r|_j of each weight matrix W, with W_r = U_r S_r V_rᵀ its best approximation of rank r.

Source: Liu, Pang, Balabanov, Yang, Huang, Yin, Yang, Liu, "LIFT the Veil for the Truth: Principal Weights Emerge after
Rank Reduction for Reasoning-Focused Supervised Fine-Tuning", arXiv 2506.00772 (2025).

As in the paper's release, the matrices are those of the layers; embeddings, the head, norms and biases are frozen. What
differs: the mask is chosen once, where the paper chooses it anew every so many steps, and each matrix gets the same
share of its weights, where the release gives it as many as LoRA of some rank would train.
"""

import torch
from torch import Tensor

from dualsft import ParameterAllocator, ScoredParameters, UserError
from dualsft_baselines.layers import in_a_layer
from dualsft_baselines.magnitude import wide
from dualsft_baselines.ranking import largest_entries


class Lift(ParameterAllocator):
    """The principal weights: the largest entries of each matrix once it is cut to a low rank (LIFT, arXiv 2506.00772).

    The budget is spread over the layers' matrices by their sizes, each expert of a fused stack being one. If it is more
    than these hold, the rest goes to the largest of the other weights. It takes a singular value decomposition of every
    matrix.

    Args:
        rank: Of the approximation; the paper's release takes 32 to 128.
    """

    needs = ("weight",)

    def __init__(self, rank: int = 128) -> None:
        if rank < 1:
            raise UserError(f"lift's rank is {rank}; give at least 1.")
        self.rank = rank

    def allocate(self, scores: ScoredParameters, budget: int) -> dict[str, Tensor]:
        """Exactly ``budget`` entries: parameter name -> bool, of its shape."""
        weights = scores.weight
        assert weights is not None
        sizes = {n: scores[n].numel() for n in sorted(scores) if _is_matrix(n, scores[n]) and in_a_layer(n)}
        spent = min(budget, sum(sizes.values()))
        shares = proportional(spent, list(sizes.values()))
        mask = {name: self._principal(weights[name], share) for name, share in zip(sizes, shares, strict=True)}
        others = [name for name in scores if name not in sizes]
        return mask | largest_entries(others, lambda name: wide(weights[name]).abs(), budget - spent)

    def _principal(self, weight: Tensor, count: int) -> Tensor:
        """The ``count`` principal entries of a matrix, or of a stack of them; bool, of the weight's shape."""
        stack = wide(weight).flatten(end_dim=-3) if weight.dim() > 2 else wide(weight)[None]
        shares = proportional(count, [matrix.numel() for matrix in stack])
        chosen = [_largest(low_rank(m, self.rank), share) for m, share in zip(stack, shares, strict=True)]
        return torch.stack(chosen).view(weight.shape)


def _is_matrix(name: str, score: Tensor) -> bool:
    """Whether a parameter is a matrix or a stack of them; a row of experts' biases is neither."""
    return score.dim() > 1 and score.numel() > 0 and not name.endswith("bias")


def low_rank(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of at most this rank."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def proportional(total: int, sizes: list[int]) -> list[int]:
    """A total split by sizes, to whole numbers that add up to it, none above its size; total at most their sum.

    Each gets its share rounded down, and one more from the largest remainder on; ties go to the first.
    """
    shares = [total * size // sum(sizes) for size in sizes]
    remainders = [total * size % sum(sizes) for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda k: -remainders[k])
    for k in by_remainder[: total - sum(shares)]:
        shares[k] += 1
    return shares


def _largest(matrix: Tensor, count: int) -> Tensor:
    return largest_entries([""], lambda _: matrix.abs(), count)[""]
