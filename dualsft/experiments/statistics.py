"""How well predicted gains foretell measured ones: order, size and differences, with 95% intervals.

A variant of a selection has a predicted gain p and a measured one g, both in nats; g is the mean over its training
seeds. How the intervals come about is in `dualsft.experiments.bootstrap`.
"""

from dataclasses import dataclass
from math import ceil, log, sqrt

import numpy as np
from jaxtyping import Float

from dualsft.experiments.bootstrap import (
    FEWEST,
    RESAMPLES,
    Estimate,
    bootstrap,
    normal_tail,
    percentiles,
    resampled_deviations,
    t_quantile,
)


@dataclass(frozen=True)
class Calibration:
    """How far predicted gains are from measured ones in size; None where there is no answer.

    Attributes:
        slope: b of the least-squares line g ≈ a + b p; 1 if predicted differences are the measured ones.
        intercept: a, in nats.
        error: √mean (g − p)², in nats. Noise of the training seeds is a part of it.
        factor: Σp / Σg, by which predictions are too large; None if the interval of Σg holds zero.
    """

    slope: Estimate | None
    intercept: Estimate | None
    error: Estimate | None
    factor: Estimate | None


def spearman(
    predicted: Float[np.ndarray, " variant"],
    measured: Float[np.ndarray, "variant seed"],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate | None:
    """Spearman's rank correlation of predicted and measured gains.

    For random subsets of the pool this is the linear datamodeling score (Park et al. 2023, TRAK).

    Args:
        predicted: p of each variant.
        measured: g of each variant and training seed; all finite.
        seed: Decides the resamples.
        resamples: B.

    Returns:
        None of fewer than `FEWEST` variants, or where all predicted or all measured gains are the same. Resamples of
        which that is true are left out.
    """
    return bootstrap(_rank_correlation, predicted, _gains(measured), seed, resamples)


def calibration(
    predicted: Float[np.ndarray, " variant"],
    measured: Float[np.ndarray, "variant seed"],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Calibration:
    """Compare the size of predicted and measured gains; arguments as those of `spearman`."""
    gains = _gains(measured)
    arguments = predicted, gains, seed, resamples
    total, sign = bootstrap(lambda p, g: g.sum(1), *arguments), np.sign(gains.sum())

    def factor(p: np.ndarray, g: np.ndarray) -> np.ndarray:
        return _ratio(p.sum(1), g.sum(1), where=sign * g.sum(1) > 0)

    return Calibration(
        slope=bootstrap(_slope, *arguments),
        intercept=bootstrap(lambda p, g: g.mean(1) - _slope(p, g) * p.mean(1), *arguments),
        error=bootstrap(lambda p, g: np.sqrt(((g - p) ** 2).mean(1)), *arguments),
        factor=bootstrap(factor, *arguments) if total and total.low * total.high > 0 else None,
    )


def difference(
    a: Float[np.ndarray, " run"], b: Float[np.ndarray, " other_run"], seed: int = 0, resamples: int = RESAMPLES
) -> Estimate | None:
    """The difference mean(a) − mean(b) of two independent samples.

    The bootstrap resamples each sample, and its interval is as wide as Welch's t would have it. That of two or three
    runs is still too short: bootstrap means of so few never lie far out.

    Returns:
        None of fewer than two runs on either side.
    """
    if min(len(a), len(b)) < 2:
        return None
    generator = np.random.default_rng(seed)
    value = float(a.mean() - b.mean())
    of_a, of_b = resampled_deviations(a, generator, resamples), resampled_deviations(b, generator, resamples)
    level = normal_tail(t_quantile(_welch_freedom(a, b)))
    return Estimate(value, *percentiles(value + of_a - of_b, level))


def mean_interval(values: Float[np.ndarray, " run"]) -> Estimate | None:
    """The mean with Student's t interval; None of fewer than two values."""
    if len(values) < 2:
        return None
    mean = float(values.mean())
    half = t_quantile(len(values) - 1) * float(values.std(ddof=1)) / sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def runs_for_width(correlation: float, width: float) -> int:
    """How many variants give Spearman's correlation r a 95% interval of at most a width.

    The interval is tanh(z ± h) with z = artanh r and h = 1.96 √((1 + r²/2)/(n − 3)) (Bonett and Wright 2000), of width
    2 sinh 2h / (cosh 2z + cosh 2h), which is solved for h.

    Args:
        correlation: r, from -1 to 1.
        width: The full width, above 0 and below 2.
    """
    if not 0 < width < 2:
        raise ValueError(f"a correlation has no interval of width {width}")
    if abs(correlation) == 1:
        return FEWEST
    spread = (1 + correlation**2) / (1 - correlation**2)  # cosh 2z
    # with x = exp 2h: (1 - width/2) x² - width spread x - (1 + width/2) = 0
    root = (width * spread + sqrt((width * spread) ** 2 + 4 - width**2)) / (2 - width)
    h = log(root) / 2
    return max(FEWEST, ceil(3 + (1 + correlation**2 / 2) * (t_quantile(np.inf) / h) ** 2))


def runs_for_ratio(runs: int, width_now: float, width: float) -> int:
    """How many runs narrow an interval from its width now to another, as its width goes with 1/√runs."""
    return max(FEWEST, ceil(runs * (width_now / width) ** 2))


def _gains(measured: Float[np.ndarray, "variant seed"]) -> Float[np.ndarray, " variant"]:
    if not np.isfinite(measured).all():
        raise ValueError("measured gains must be finite")
    return measured.mean(1)


def _rank_correlation(predicted: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Pearson's correlation of the ranks; ties share their mean rank."""
    from scipy.stats import rankdata

    p, g = (_centred(rankdata(values, axis=1)) for values in (predicted, gains))
    scale = np.sqrt((p**2).sum(1) * (g**2).sum(1))
    return np.clip(_ratio((p * g).sum(1), scale, where=scale > 0), -1, 1)


def _slope(predicted: np.ndarray, gains: np.ndarray) -> np.ndarray:
    p = _centred(predicted)
    return _ratio((p * gains).sum(1), (p**2).sum(1), where=np.ptp(predicted, axis=1) > 0)


def _centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean(1, keepdims=True)


def _ratio(above: np.ndarray, below: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The quotient; NaN elsewhere."""
    return np.divide(above, below, out=np.full(below.shape, np.nan), where=where)


def _welch_freedom(a: np.ndarray, b: np.ndarray) -> float:
    """The degrees of freedom of Welch's t; infinite if neither sample varies."""
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    below = va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)
    return float((va + vb) ** 2 / below) if below > 0 else np.inf
