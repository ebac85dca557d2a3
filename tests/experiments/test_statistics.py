"""Figures equal their definitions, and their intervals hold the truth about as often as they say."""

import json
from collections.abc import Callable
from itertools import pairwise
from math import atanh, sqrt, tanh
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dualsft.experiments.bootstrap import FEWEST, Estimate
from dualsft.experiments.statistics import (
    calibration,
    difference,
    mean_interval,
    runs_for_ratio,
    runs_for_width,
    spearman,
)


def simulate(
    seed: int, variants: int = 30, seeds: int = 1, slope: float = 0.5, noise: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Normal predicted gains around 3, and measured ones on a line through zero, with noise of the training seeds."""
    generator = np.random.default_rng(seed)
    predicted = generator.normal(3, 1, size=(variants,))
    deviations = noise * sqrt(seeds) * generator.normal(size=(variants, seeds))
    return predicted, slope * predicted[:, None] + deviations


def bounds(estimate: Estimate | None) -> tuple[float, float, float]:
    """An estimate's low end, value and high end; there must be one, and no number may be NaN."""
    assert estimate is not None
    assert not np.isnan([estimate.low, estimate.value, estimate.high]).any()
    assert estimate.low <= estimate.high
    return estimate.low, estimate.value, estimate.high


def rank(values: list[float], value: float) -> float:
    """The mean place of a value among others, which is that of all equal to it."""
    return sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2


def test_spearman_is_the_correlation_of_ranks() -> None:
    """By the definition, with ties on both sides, of the means over seeds."""
    predicted, measured = simulate(1, seeds=3)
    predicted, measured = predicted.round(), (4 * measured).round() / 4
    p, g = predicted.tolist(), measured.mean(1).tolist()
    ranks = [[rank(values, value) for value in values] for values in (p, g)]
    assert bounds(spearman(predicted, measured))[1] == pytest.approx(np.asarray(np.corrcoef(ranks))[0, 1])


def test_calibration_is_least_squares() -> None:
    """Slope and intercept solve the normal equations; error and factor are as defined."""
    predicted, measured = simulate(2, seeds=2)
    g, design = measured.mean(1), np.stack([np.ones_like(predicted), predicted], axis=1)
    intercept, slope = np.linalg.solve(design.T @ design, design.T @ g)
    found = calibration(predicted, measured)
    assert bounds(found.slope)[1] == pytest.approx(slope)
    assert bounds(found.intercept)[1] == pytest.approx(intercept)
    assert bounds(found.error)[1] == pytest.approx(sqrt(sum((g - predicted) ** 2) / len(g)))
    assert bounds(found.factor)[1] == pytest.approx(sum(predicted) / sum(g))


def test_perfect_predictions_are_found_perfect() -> None:
    """Measured as predicted: correlation, slope and factor 1, intercept and error 0, and so in every resample."""
    predicted, _ = simulate(3)
    measured = predicted[:, None]
    found = calibration(predicted, measured)
    for estimate, due in (
        (spearman(predicted, measured), 1),
        (found.slope, 1),
        (found.factor, 1),
        (found.intercept, 0),
        (found.error, 0),
    ):
        assert bounds(estimate) == pytest.approx((due,) * 3, abs=1e-12)


def test_shuffled_predictions_are_found_worthless() -> None:
    """The intervals of correlation and slope hold 0."""
    predicted, measured = simulate(4, noise=0.1)
    shuffled = np.random.default_rng(0).permutation(predicted)
    for estimate in (spearman(shuffled, measured), calibration(shuffled, measured).slope):
        low, _, high = bounds(estimate)
        assert low < 0 < high


def test_negated_predictions_are_found_reversed() -> None:
    """The intervals of correlation, slope and factor lie below 0."""
    predicted, measured = simulate(5, noise=0.2)
    found = calibration(-predicted, measured)
    for estimate in (spearman(-predicted, measured), found.slope, found.factor):
        assert bounds(estimate)[2] < 0


def correlation_of(predicted: np.ndarray, measured: np.ndarray) -> Estimate | None:
    """Spearman's correlation with few resamples."""
    return spearman(predicted, measured, resamples=300)


def slope_of(predicted: np.ndarray, measured: np.ndarray) -> Estimate | None:
    """The slope with few resamples."""
    return calibration(predicted, measured, resamples=300).slope


COVERED: dict[str, tuple[Callable[..., Estimate | None], int, int]] = {
    "spearman": (correlation_of, 20, 1),
    "spearman, seeds": (correlation_of, 20, 3),
    "slope": (slope_of, 10, 1),
    "slope, seeds": (slope_of, 10, 3),
}


@pytest.mark.parametrize(("figure", "variants", "seeds"), COVERED.values(), ids=COVERED.keys())
def test_intervals_hold_the_truth(figure: Callable[..., Estimate | None], variants: int, seeds: int) -> None:
    """In at least 90 of 100 simulations: 95 less two standard deviations of chance."""
    noise = 0.25  # of means over seeds, whose Pearson correlation with the predictions is r = 0.5 / √(0.5² + 0.25²)
    truth = 0.5 if figure is slope_of else 6 / np.pi * np.arcsin(0.5 / sqrt(0.5**2 + noise**2) / 2)
    found = [bounds(figure(*simulate(k, variants, seeds, noise=noise))) for k in range(100)]
    assert sum(low <= truth <= high for low, _, high in found) >= 90


def test_few_variants_have_no_figures() -> None:
    """Four are too few; of five, resamples of one variant alone leave no trace."""
    predicted, measured = simulate(6, variants=4)
    assert spearman(predicted, measured) is None
    assert set(vars(calibration(predicted, measured)).values()) == {None}
    predicted, measured = simulate(6, variants=5)
    for estimate in (spearman(predicted, measured), *vars(calibration(predicted, measured)).values()):
        bounds(estimate)


def test_constant_gains_have_no_order() -> None:
    """Nor a slope, where predictions are constant, though their mean is rounded to another number."""
    predicted, measured = simulate(7)
    constant = np.full(30, 0.1)
    assert spearman(constant, measured) is None
    assert spearman(predicted, constant[:, None]) is None
    found = calibration(constant, measured)
    assert found.slope is found.intercept is None
    bounds(found.error)
    bounds(found.factor)


def test_ties_in_most_variants_give_an_interval() -> None:
    """Resamples without the one variant that differs are left out."""
    predicted = np.array([1.0, 0.0, 0.0, 0.0, 0.0])
    low, value, high = bounds(spearman(predicted, predicted[:, None]))
    assert (low, value, high) == pytest.approx((1, 1, 1))


def test_no_factor_where_gains_may_be_none() -> None:
    """Whether predictions are too large cannot be said of measured gains around zero."""
    predicted, measured = simulate(8, slope=0.0)
    assert calibration(predicted, measured).factor is None


def test_lost_measurements_are_refused() -> None:
    """A run without a finite loss has no gain, and no figure may hide it."""
    predicted, measured = simulate(9)
    measured[3, 0] = np.inf
    with pytest.raises(ValueError, match="measured gains must be finite"):
        spearman(predicted, measured)


def test_the_seed_decides() -> None:
    """The resamples, and so the interval, but not the figure."""
    predicted, measured = simulate(10)
    first, again, other = (spearman(predicted, measured, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert bounds(first)[1] == bounds(other)[1]


def test_differences_are_as_wide_as_welch() -> None:
    """Within a tenth, for samples of unlike size and spread; of samples that do not vary there is no doubt."""
    generator = np.random.default_rng(11)
    a, b = 1 + 0.3 * generator.standard_normal(8), generator.standard_normal(25)
    low, value, high = bounds(difference(a, b))
    due = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert value == pytest.approx(a.mean() - b.mean())
    assert high - low == pytest.approx(due.high - due.low, rel=0.1)
    assert bounds(difference(np.full(3, 0.3), np.full(2, 0.1))) == pytest.approx((0.2,) * 3)
    assert difference(a[:1], b) is None


def test_mean_has_the_interval_of_student() -> None:
    """As scipy computes it."""
    values = np.random.default_rng(12).standard_normal(5)
    due = stats.ttest_1samp(values, 0).confidence_interval()
    assert bounds(mean_interval(values)) == pytest.approx((due.low, values.mean(), due.high))
    assert mean_interval(values[:1]) is None


@pytest.mark.parametrize("correlation", [0.0, -0.3, 0.68, 0.95, 0.999])
@pytest.mark.parametrize("width", [0.05, 0.2, 1.0])
def test_runs_for_width_are_the_fewest(correlation: float, width: float) -> None:
    """One less would give a wider interval, by the formula."""
    runs = runs_for_width(correlation, width)

    def width_of(n: int) -> float:
        half = stats.norm.isf(0.025) * sqrt((1 + correlation**2 / 2) / (n - 3))
        return tanh(atanh(correlation) + half) - tanh(atanh(correlation) - half)

    assert width_of(runs) <= width
    assert runs == FEWEST or width_of(runs - 1) > width


def test_runs_follow_the_square_root() -> None:
    """Half the width takes four times the runs; a perfect correlation takes the fewest that anything is said of."""
    assert [runs_for_ratio(10, 0.4, width) for width in (0.4, 0.2, 0.1, 4.0)] == [10, 40, 160, FEWEST]
    assert runs_for_width(1.0, 0.2) == runs_for_width(-1.0, 0.2) == FEWEST
    needed = [runs_for_width(r, 0.2) for r in (0.0, 0.3, 0.6, 0.9)]
    assert all(more > fewer for more, fewer in pairwise(needed))
    for width in (0.0, 2.0):
        with pytest.raises(ValueError, match="no interval of width"):
            runs_for_width(0.5, width)


def test_estimates_are_written_as_value_and_interval() -> None:
    """In JSON."""
    written: Any = json.loads(json.dumps(Estimate(0.5, 0.25, 0.75).to_json()))
    assert written == {"value": 0.5, "interval": [0.25, 0.75]}
