"""Quantiles at fixed levels."""

from collections.abc import Sequence

import numpy as np

LEVELS = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
"""The levels at which quantiles are kept."""

Quantiles = dict[str, float]
"""A level of `LEVELS`, as text -> the smallest value that is at least as large as this share of the values."""


def quantiles(values: np.ndarray | Sequence[float]) -> Quantiles:
    """Exact quantiles at `LEVELS`; empty without values."""
    if not len(values):
        return {}
    found = np.quantile(np.asarray(values, np.float64), LEVELS, method="inverted_cdf")
    return dict(zip(map(str, LEVELS), found.tolist(), strict=True))


def budget_counts(available: int) -> Sequence[int]:
    """How many of the available things budgets of 1% to 100% allow; see `dualsft.allocators.count_of`."""
    return [max(1, percent * available // 100) for percent in range(1, 101)]
