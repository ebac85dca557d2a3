"""Quantiles and sums of many float32 scores in the memory of one histogram.

A score falls into the bin of its upper sixteen bits: sign, exponent and seven bits of the fraction. The scores of a bin
differ by less than 2^-7 of their size, so that a quantile is that near, and all sums are exact up to the share that a
budget takes of a single bin.
"""

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dualsft.selection.diagnostics.levels import LEVELS, budget_counts

_BINS, _ZERO = 2**16, 2**15
"""How many bins there are, and the first that holds no negative score."""
CHUNK = 2**20
"""Scores that are looked at together."""


class ScoreHistogram:
    """Counts and sums of float32 scores, the bins in the order of the scores.

    Attributes:
        counts: How many scores each bin holds.
        sums: Their sum.
        least: The lowest score.
        most: The highest score.
        positive: How many scores are above zero.
    """

    def __init__(self) -> None:
        self.counts: Int[np.ndarray, " bin"] = np.zeros(_BINS, np.int64)
        self.sums: Float[np.ndarray, " bin"] = np.zeros(_BINS)
        self.least, self.most, self.positive = float("inf"), float("-inf"), 0

    def add(self, scores: Float[Tensor, " score"]) -> None:
        """Add scores on the host, at most `CHUNK` at a time."""
        if not len(scores):
            return
        upper = (scores.contiguous().view(torch.int32) >> 16) + _ZERO
        self.counts += _in_order(torch.bincount(upper, minlength=_BINS))
        self.sums += _in_order(torch.bincount(upper, scores.double(), minlength=_BINS))
        self.least = min(self.least, float(scores.min()))
        self.most = max(self.most, float(scores.max()))
        self.positive += int(torch.count_nonzero(scores > 0))

    def merge(self, other: "ScoreHistogram") -> None:
        """Add the scores of another histogram."""
        self.counts += other.counts
        self.sums += other.sums
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)
        self.positive += other.positive

    @property
    def count(self) -> int:
        """How many scores there are."""
        return int(self.counts.sum())

    @property
    def positive_sum(self) -> float:
        """The sum of the scores above zero."""
        return float(self.sums[_ZERO:].sum())

    def quantiles(self) -> dict[str, float]:
        """Level -> quantile: the mean of its bin, and the very lowest and highest at 0 and 1; empty without scores."""
        if not self.count:
            return {}
        reached = np.searchsorted(np.cumsum(self.counts), [_rank(level, self.count) for level in LEVELS])
        values = self.sums[reached] / self.counts[reached]
        inner = dict(zip(map(str, LEVELS), values.tolist(), strict=True))
        return {**inner, str(LEVELS[0]): self.least, str(LEVELS[-1]): self.most}

    def capture(self) -> list[float]:
        """The share of the positive sum that the highest 1% to 100% of the scores hold; empty if there is none."""
        return _capture(self.counts[_ZERO:][::-1], self.sums[_ZERO:][::-1], self.count)

    def capture_by_magnitude(self) -> list[float]:
        """The share of Σ |φ| that the largest 1% to 100% of |φ| hold; empty if all are zero."""
        counts = self.counts[_ZERO:] + self.counts[:_ZERO][::-1]
        sums = self.sums[_ZERO:] - self.sums[:_ZERO][::-1]
        return _capture(counts[::-1], sums[::-1], self.count)


def _rank(level: float, count: int) -> int:
    """The place from 1 of a quantile among sorted values."""
    return max(1, int(np.ceil(level * count)))


def _in_order(values: Shaped[Tensor, " bin"]) -> Shaped[np.ndarray, " bin"]:
    """Bins in the order of the upper halves as integers, where those of negative scores are the wrong way round."""
    return torch.cat([values[:_ZERO].flip(0), values[_ZERO:]]).numpy()


def _capture(counts: Int[np.ndarray, " bin"], sums: Float[np.ndarray, " bin"], available: int) -> list[float]:
    """The share of all sums that each percent of ``available`` takes, from the first bin on, a bin's share evenly."""
    held, total = np.concatenate([[0], np.cumsum(counts)]), np.concatenate([[0.0], np.cumsum(sums)])
    if not total[-1] > 0:
        return []
    return (np.interp(budget_counts(available), held, total) / total[-1]).tolist()
