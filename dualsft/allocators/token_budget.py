"""The choice of largest total score within a budget of supervised tokens: a 0/1 knapsack.

    maximise Σ_k x_k φ_k   subject to   Σ_k x_k w_k ≤ W,   x_k ∈ {0, 1}

with w_k the supervised tokens of example k and W the budget. Where an example may be split (the linear relaxation), the
best is to take the examples in order of φ_k / w_k until one, the break item b, no longer fits. Deciding example k the
other way costs the relaxation at least

    loss_k = |φ_k - w_k φ_b / w_b|

so examples of large loss, those far better or far worse than b, are decided as in the relaxation; the others, the core,
are decided exactly, by dynamic programming over the tokens that are left for them. Sources: Balas & Zemel, An Algorithm
for Large Zero-One Knapsack Problems (1980); Pisinger, A Minimal Algorithm for the 0-1 Knapsack Problem (1997). A
general solver of integer programmes is no substitute: on pools of 20,000 examples `scipy.optimize.milp` (HiGHS) takes a
minute, or stops at less, where this takes a tenth of a second.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dualsft.allocators.base import DataAllocator, ScoredExamples, check_any_positive
from dualsft.errors import UserError

Scores = Float[np.ndarray, " item"]
Tokens = Int[np.ndarray, " item"]
Taken = Bool[np.ndarray, " item"]

_CELLS = 20_000_000
"""Largest size of the dynamic programme, core examples times tokens: a byte of memory each, about 0.2 s in all."""


class TokenBudget(DataAllocator):
    """The most total score within a number of supervised tokens, none of it from an example that is not positive.

    The choice is optimal if the core is all of the pool, and close to it otherwise; it is never worse than taking the
    examples in order of score per token and skipping what does not fit, nor than the best example alone. Of examples
    that are alike in score and tokens, the earlier rows are chosen.
    """

    unit = "tokens"
    exact = False

    def allocate(self, examples: ScoredExamples, budget: int) -> Int[Tensor, " chosen"]:
        """Examples of at most ``budget`` supervised tokens; refuses a pool where no positive score fits into them."""
        score, tokens = examples.score.double().numpy(), examples.num_tokens.numpy().astype(np.int64)
        check_any_positive("token_budget", examples.score)
        positive = score > 0
        fits = np.flatnonzero(positive & (tokens <= budget))
        if not len(fits):
            raise UserError(
                f"token_budget has a budget of {budget:,} supervised tokens, but the shortest example with a positive "
                f"score has {tokens[positive].min():,}; raise the budget."
            )
        chosen = fits[knapsack(score[fits], tokens[fits], budget)]
        return examples.example_id[torch.from_numpy(chosen)]


def knapsack(score: Scores, tokens: Tokens, budget: int, cells: int = _CELLS) -> Taken:
    """Which items to take, all of positive score and of at most the budget of tokens; see `_CELLS`."""
    order = np.argsort(-score / np.maximum(tokens, 1), kind="stable")
    taken = np.zeros(len(order), dtype=bool)
    taken[order] = _best(score[order], tokens[order], budget, cells)
    return _earliest(taken, score, tokens)


def _best(score: Scores, tokens: Tokens, budget: int, cells: int) -> Taken:
    """The best of three choices, each filled up with items that still fit; items are in order of score per token."""
    nothing, highest = np.zeros((2, len(score)), dtype=bool)
    highest[score.argmax()] = True
    starts = (_with_core(score, tokens, budget, cells), nothing, highest)
    return max((_filled(start, tokens, budget) for start in starts), key=lambda taken: score[taken].sum())


def _with_core(score: Scores, tokens: Tokens, budget: int, cells: int) -> Taken:
    """Items up to the break item, with the core around it decided exactly; items are in order of score per token."""
    taken = tokens.cumsum() <= budget
    if taken.all():
        return taken
    b = int(taken.argmin())
    loss = np.abs(score - tokens * (score[b] / tokens[b]))
    by_loss = np.argsort(loss, kind="stable")
    free = budget - tokens[taken].sum() + (tokens * taken)[by_loss].cumsum()  # tokens, if the core ends here
    size = max(1, int(((free + 1) * np.arange(1, len(free) + 1)).searchsorted(cells, side="right")))
    core = np.sort(by_loss[:size])
    taken[core] = _solved(score[core], tokens[core], int(free[size - 1]))
    return taken


def _solved(score: Scores, tokens: Tokens, budget: int) -> Taken:
    """The optimal choice; ``best[w]`` is the largest total score of the items so far within w tokens."""
    best = np.zeros(budget + 1)
    improves = np.zeros((len(score), budget + 1), dtype=bool)
    for k, width in enumerate(tokens.tolist()):
        if width <= budget:
            with_item = best[: budget + 1 - width] + score[k]
            np.greater(with_item, best[width:], out=improves[k, width:])
            np.maximum(with_item, best[width:], out=best[width:])
    taken = np.zeros(len(score), dtype=bool)
    for k in reversed(range(len(score))):
        taken[k] = improves[k, budget]
        budget -= int(tokens[k]) * int(taken[k])
    return taken


def _filled(taken: Taken, tokens: Tokens, budget: int) -> Taken:
    """Add every further item that still fits, first to last."""
    filled = taken.copy()
    left = budget - int(tokens[taken].sum())
    for k in np.flatnonzero(~taken & (tokens <= left)).tolist():
        if tokens[k] <= left:
            filled[k] = True
            left -= int(tokens[k])
    return filled


def _earliest(taken: Taken, score: Scores, tokens: Tokens) -> Taken:
    """The same choice, with the first of the items that are equal in score and tokens."""
    order = np.lexsort((tokens, score))
    new_kind = (np.diff(score[order], prepend=-1) != 0) | (np.diff(tokens[order], prepend=-1) != 0)
    starts = np.flatnonzero(new_kind)
    sizes = np.diff(starts, append=len(order))
    counts = np.add.reduceat(taken[order].astype(np.int64), starts)
    earliest = np.zeros_like(taken)
    earliest[order] = np.arange(len(order)) - np.repeat(starts, sizes) < np.repeat(counts, sizes)
    return earliest
