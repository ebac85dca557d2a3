"""Says in plain words what an audit's figures mean for one side of a selection."""

from dataclasses import dataclass
from typing import Literal

from dualsft.experiments.bootstrap import FEWEST, Estimate
from dualsft.experiments.statistics import runs_for_width

Side = Literal["data", "parameters", "joint"]

TRUSTED = 0.5
"""Rank correlation from which an order can be trusted: of two variants, the better is then found in two of three cases.

The interval's low end must reach it. For normal gains P(right order) = ½ + arcsin(ρ)/π, with ρ = 2 sin(π r/6), is 0.67.
"""
WIDTH = 0.2
"""Width of the interval that runs are counted for: it tells chance from an order that can be trusted."""


@dataclass(frozen=True)
class _Words:
    order: str
    chosen: str
    random: str


_WORDS: dict[Side, _Words] = {
    "data": _Words("the order of examples", "the chosen examples gain", "random ones"),
    "parameters": _Words("the mask's order", "the chosen weights gain", "random ones"),
    "joint": _Words("the order of pairs", "the chosen examples and weights together gain", "random pairs"),
}


def verdict(
    side: Side,
    *,
    variants: int,
    steps: int,
    spearman: Estimate | None,
    factor: Estimate | None,
    slope: Estimate | None = None,
    over_random: Estimate | None = None,
    over_lowest: Estimate | None = None,
) -> str:
    """Put the figures of one side into a sentence: the order, the size of predictions, the gain over controls.

    Args:
        side: What varied: the examples, the weights, or both.
        variants: How many variants were trained.
        steps: Optimizer steps of each.
        spearman: The rank correlation of predicted and measured gains.
        factor: By how much predicted gains are too large.
        slope: Of measured on predicted gains. Where gains nearly cancel in sum, and so have no factor, it tells by how
            much their differences are too large.
        over_random: Mean gain of what was chosen less that of random choices, in nats; None leaves it out.
        over_lowest: The same against the lowest scores.
    """
    words = _WORDS[side]
    said = [_order(words.order, spearman, variants), _size(factor, slope, steps)]
    said += [_advantage(words.chosen, words.random, over_random)] if over_random else []
    said += [_advantage(words.chosen, "the lowest", over_lowest)] if over_lowest else []
    return "; ".join(said)


def _order(order: str, spearman: Estimate | None, variants: int) -> str:
    if spearman is None:
        if variants >= FEWEST:
            return f"{order} cannot be judged, as all predicted or all measured gains are the same"
        return f"{order} cannot be judged: {_too_few(variants, 0.0)}"
    # z: no minus before 0.00
    found = f"({spearman.value:z.2f}, {spearman.low:z.2f} to {spearman.high:z.2f})"
    if spearman.low >= TRUSTED:
        return f"{order} can be trusted {found}"
    if spearman.low > 0:
        return f"{order} is better than chance {found}"
    if spearman.high < 0:
        return f"{order} is reversed {found}"
    if spearman.high < TRUSTED:
        return f"{order} is not better than chance {found}"
    return f"{order} is not better than chance {found}, but {_too_few(variants, spearman.value)}"


def _too_few(variants: int, correlation: float) -> str:
    """Says how many runs tell an order that can be trusted from chance."""
    needed = runs_for_width(correlation, WIDTH)
    are = "run is" if variants == 1 else "runs are"
    return f"{variants:,} {are} too few to tell, and an interval of width {WIDTH} needs about {needed:,}"


def _size(factor: Estimate | None, slope: Estimate | None, steps: int) -> str:
    after = f"after {steps:,} step{'' if steps == 1 else 's'}"
    if factor is not None and factor.high < 0:
        return f"predicted gains have the opposite sign of the measured ones {after}"
    if factor is not None and factor.low > 0:
        return f"predicted gains are {_too_large(factor)} {after}"
    if slope is not None and slope.low > 0:
        return f"differences of predicted gains are {_too_large(_inverse(slope))} {after}"
    return f"whether predicted gains are too large cannot be said {after}"


def _too_large(factor: Estimate) -> str:
    if factor.low <= 1 <= factor.high:
        return f"of the measured size (ratio {_number(factor.value)}, {_range(factor)})"
    if factor.low > 1:
        return f"{_number(factor.value)} times too large ({_range(factor)})"
    inverse = _inverse(factor)
    return f"{_number(inverse.value)} times too small ({_range(inverse)})"


def _inverse(estimate: Estimate) -> Estimate:
    return Estimate(1 / estimate.value, 1 / estimate.high, 1 / estimate.low)


def _advantage(chosen: str, control: str, gain: Estimate) -> str:
    if gain.low <= 0 <= gain.high:
        return f"{chosen} no more than {control} ({_number(gain.value)} nats, {_range(gain)})"
    if gain.low > 0:
        return f"{chosen} {_number(gain.value)} nats ({_range(gain)}) more than {control}"
    less = Estimate(-gain.value, -gain.high, -gain.low)
    return f"{chosen} {_number(less.value)} nats ({_range(less)}) less than {control}"


def _range(estimate: Estimate) -> str:
    return f"{_number(estimate.low)} to {_number(estimate.high)}"


def _number(value: float) -> str:
    """Two digits, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}"
