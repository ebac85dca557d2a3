"""Each figure's interval decides what is said of it, in words that a reader needs no statistics for."""

from typing import Any

import pytest

from dualsft.experiments.bootstrap import Estimate
from dualsft.experiments.verdict import verdict

FIGURES: dict[str, Any] = {
    "variants": 40,
    "steps": 50,
    "spearman": Estimate(0.68, 0.6, 0.75),
    "factor": Estimate(2.1, 1.8, 2.5),
    "over_random": Estimate(0.12, 0.08, 0.16),
    "over_lowest": None,
}


def said(**figures: Any) -> list[str]:
    """The clauses of a verdict on the data, of these figures and the usual others."""
    return verdict("data", **FIGURES | figures).split("; ")


def test_a_verdict_is_one_sentence() -> None:
    """Order, size, and the gain over each control that was measured."""
    assert verdict("data", **FIGURES | {"over_lowest": Estimate(0.31, 0.2, 0.4)}) == (
        "the order of examples can be trusted (0.68, 0.60 to 0.75); "
        "predicted gains are 2.1 times too large (1.8 to 2.5) after 50 steps; "
        "the chosen examples gain 0.12 nats (0.08 to 0.16) more than random ones; "
        "the chosen examples gain 0.31 nats (0.2 to 0.4) more than the lowest"
    )


def test_each_side_has_its_words() -> None:
    """The mask has an order of its own, and pairs are of both sides."""
    assert verdict("parameters", **FIGURES).startswith("the mask's order can be trusted")
    assert verdict("parameters", **FIGURES).endswith(
        "the chosen weights gain 0.12 nats (0.08 to 0.16) more than random ones"
    )
    assert verdict("joint", **FIGURES).startswith("the order of pairs can be trusted")


@pytest.mark.parametrize(
    ("value", "low", "high", "words"),
    [
        (0.7, 0.5, 0.8, "can be trusted (0.70, 0.50 to 0.80)"),
        (0.7, 0.49, 0.8, "is better than chance (0.70, 0.49 to 0.80)"),
        (0.1, 0.0, 0.3, "is not better than chance (0.10, 0.00 to 0.30)"),
        (0.0, -0.001, 0.3, "is not better than chance (0.00, 0.00 to 0.30)"),
        (-0.3, -0.6, -0.1, "is reversed (-0.30, -0.60 to -0.10)"),
        (
            0.2,
            -0.4,
            0.7,
            "is not better than chance (0.20, -0.40 to 0.70), but 40 runs are too few to tell, "
            "and an interval of width 0.2 needs about 362",
        ),
    ],
)
def test_the_interval_decides_on_the_order(value: float, low: float, high: float, words: str) -> None:
    """Not the figure itself; an interval from chance to trust says that runs are lacking, and how many it takes."""
    assert said(spearman=Estimate(value, low, high))[0] == f"the order of examples {words}"


def test_an_order_without_a_figure_has_its_reason() -> None:
    """Too few runs, or gains that do not differ."""
    few = (
        "the order of examples cannot be judged: 1 run is too few to tell, and an interval of width 0.2 needs about 385"
    )
    assert said(spearman=None, variants=1)[0] == few
    assert "all measured gains are the same" in said(spearman=None, variants=5)[0]


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (Estimate(123.4, 110.0, 1150.0), "predicted gains are 123 times too large (110 to 1,150)"),
        (Estimate(0.5, 0.4, 0.8), "predicted gains are 2 times too small (1.2 to 2.5)"),
        (Estimate(1.04, 0.9, 1.2), "predicted gains are of the measured size (ratio 1, 0.9 to 1.2)"),
        (Estimate(-1.0, -2.0, -0.5), "predicted gains have the opposite sign of the measured ones"),
        (Estimate(0.2, -0.1, 1.5), "whether predicted gains are too large cannot be said"),
        (None, "whether predicted gains are too large cannot be said"),
    ],
)
def test_the_interval_decides_on_the_size(factor: Estimate | None, words: str) -> None:
    """Too large, too small, right, or unknown."""
    assert said(factor=factor)[1] == f"{words} after 50 steps"
    assert said(factor=factor, steps=1)[1] == f"{words} after 1 step"


@pytest.mark.parametrize(
    ("slope", "words"),
    [
        (Estimate(0.25, 0.125, 0.5), "differences of predicted gains are 4 times too large (2 to 8)"),
        (Estimate(1.0, 0.5, 2.0), "differences of predicted gains are of the measured size (ratio 1, 0.5 to 2)"),
        (Estimate(0.25, -0.1, 0.5), "whether predicted gains are too large cannot be said"),
    ],
)
def test_gains_that_cancel_in_sum_are_judged_by_their_differences(slope: Estimate, words: str) -> None:
    """Where there is no factor, or one of either sign, the slope tells the size."""
    for factor in (None, Estimate(0.2, -0.1, 1.5)):
        assert said(factor=factor, slope=slope)[1] == f"{words} after 50 steps"
    assert said(slope=slope) == said()


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (Estimate(-0.5, -0.75, -0.25), "gain 0.5 nats (0.25 to 0.75) less than random ones"),
        (Estimate(0.01, -0.02, 0.05), "gain no more than random ones (0.01 nats, -0.02 to 0.05)"),
    ],
)
def test_the_interval_decides_on_the_advantage(gain: Estimate, words: str) -> None:
    """A loss is told as one, and a gain that may be none as none."""
    assert said(over_random=gain)[2] == f"the chosen examples {words}"


def test_controls_that_were_not_trained_are_left_out() -> None:
    """What is not known of them takes no words."""
    assert len(said(over_random=None)) == 2
