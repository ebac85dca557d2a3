"""95% intervals by a bootstrap over the variants of a selection.

A variant has a predicted gain p and a measured one g, the mean over its training seeds. Intervals are percentiles over
B resamples of n variants each, at levels widened for small n so that they are as wide as Student's t would have the
interval of a mean (Hesterberg 2015, "What Teachers Should Know about the Bootstrap", section 5.3):
Φ(−√(n/(n−1)) t_{n−1, 0.975}) in place of 0.025. Percentiles rather than BCa, because BCa is undefined where all
resamples agree, as at a correlation of 1, and covered no better in simulations of 8 to 40 variants.

A resampled variant keeps all of its seeds (Davison and Hinkley 1997, section 3.8): its mean already varies as seeds
make it vary. Resampling seeds as well adds that noise a second time, and lowers resampled correlations below the
estimate: with 40 variants of three seeds and a Pearson correlation of 0.9, such intervals held the true rank
correlation in 81% of simulations, and these in 95%. What one seed does to all variants alike shows in neither.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import numpy as np

FEWEST = 5
"""Variants below which nothing is said: chance finds the right one of four variants' orders in one of 24 cases."""
RESAMPLES = 5_000
_TAIL = 0.025  # of either side

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Takes p and g of several draws of variants, (draw, variant) each, to a number for each; NaN where there is none."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, object]:
        """The figure as ``value``, and its ``interval`` as a list of two."""
        return {"value": self.value, "interval": [self.low, self.high]}


def bootstrap(
    statistic: Statistic, predicted: np.ndarray, gains: np.ndarray, seed: int, resamples: int
) -> Estimate | None:
    """A statistic with its interval over variants; resamples where it has no value are left out.

    Args:
        statistic: What to compute of p and g.
        predicted: p of each variant.
        gains: g of each variant.
        seed: Decides the resamples.
        resamples: B.

    Returns:
        None of fewer than `FEWEST` variants, or where the statistic has no value.
    """
    count = len(predicted)
    if count < FEWEST:
        return None
    resampled = np.random.default_rng(seed).integers(count, size=(resamples, count))
    rows = np.vstack([np.arange(count), resampled])  # the sample itself comes first
    values = statistic(predicted[rows], gains[rows])
    if np.isnan(values[0]):
        return None
    level = normal_tail(sqrt(count / (count - 1)) * t_quantile(count - 1))
    return Estimate(float(values[0]), *percentiles(values[1:], level))


def resampled_deviations(values: np.ndarray, generator: np.random.Generator, resamples: int) -> np.ndarray:
    """Deviations of resampled means from the mean, stretched by √(n/(n−1)), which makes their variance unbiased."""
    count = len(values)
    means = values[generator.integers(count, size=(resamples, count))].mean(1)
    return (means - values.mean()) * sqrt(count / (count - 1))


def percentiles(draws: np.ndarray, level: float) -> tuple[float, float]:
    """The percentiles at a level and at its complement, of the draws that have a value."""
    low, high = np.quantile(draws[~np.isnan(draws)], [level, 1 - level])
    return float(low), float(high)


def t_quantile(freedom: float) -> float:
    """The 0.975 quantile of Student's t."""
    from scipy.stats import t

    return float(t.isf(_TAIL, freedom))


def normal_tail(quantile: float) -> float:
    """The share of a normal law beyond so many standard deviations."""
    from scipy.stats import norm

    return float(norm.sf(quantile))
