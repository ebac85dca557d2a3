import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dualsft.selection.diagnostics import LEVELS
from dualsft.selection.diagnostics.figures import ScoreFigures
from dualsft.selection.diagnostics.histogram import ScoreHistogram
from dualsft.selection.diagnostics.levels import budget_counts


def histogram(*parts: torch.Tensor) -> ScoreHistogram:
    """The histogram of scores that come in several parts, each in a histogram of its own."""
    all_ = ScoreHistogram()
    for part in parts:
        (own := ScoreHistogram()).add(part)
        all_.merge(own)
    return all_


@pytest.fixture
def scores() -> torch.Tensor:
    """Scores of both signs over thirty orders of magnitude, zeros of both signs, denormals and ties among them."""
    generator = torch.Generator().manual_seed(0)
    size = torch.exp(torch.randn(3000, generator=generator) * 6)
    odd = torch.tensor([0.0, -0.0, 1e-42, -1e-42, 2.5, 2.5, 2.5, 3e38, -3e38])
    return torch.cat([size * torch.randn(3000, generator=generator), odd])


def test_quantiles_are_those_of_the_sorted_scores(scores: torch.Tensor) -> None:
    """To 2^-7 of their size, with the lowest and the highest exact."""
    found, exact = histogram(*scores.split(700)).quantiles(), np.sort(scores.double().numpy())
    assert list(found) == [str(level) for level in LEVELS]
    assert (found["0.0"], found["1.0"]) == (exact[0], exact[-1])
    for level in LEVELS:
        due = exact[max(1, math.ceil(level * len(exact))) - 1]
        assert found[str(level)] == pytest.approx(due, rel=2**-7, abs=1e-38)


def test_sums_and_counts_are_exact(scores: torch.Tensor) -> None:
    """Of all scores and of the positive ones."""
    found, wide = histogram(scores[:-2]), scores[:-2].double()
    assert found.count == len(wide)
    assert found.positive == int((wide > 0).sum())
    assert found.positive_sum == pytest.approx(float(wide[wide > 0].sum()), rel=1e-12)
    assert float(found.sums.sum()) == pytest.approx(float(wide.sum()), rel=1e-9)


@pytest.mark.parametrize("spread", [0.3, 6.0])
@pytest.mark.parametrize("count", [1, 7, 3000])
def test_captures_are_the_sums_of_the_highest(spread: float, count: int) -> None:
    """To 2^-7 of what the last bin holds, for each budget, by score and by magnitude; the last one is everything."""
    generator = torch.Generator().manual_seed(count)
    scores = torch.randn(count, generator=generator) * torch.exp(torch.randn(count, generator=generator) * spread)
    scores[0] = 1.5
    for found, values in (
        (histogram(scores).capture(), scores.double().clamp(min=0)),
        (histogram(scores).capture_by_magnitude(), scores.double().abs()),
    ):
        ranked = values.sort(descending=True).values
        due = [float(ranked[:k].sum() / ranked.sum()) for k in budget_counts(count)]
        assert found == pytest.approx(due, rel=2**-7)
        assert found[-1] == pytest.approx(1)
        assert found == sorted(found)


def test_without_a_positive_score_nothing_is_captured() -> None:
    """Neither of negative scores alone nor of none; the magnitudes of the former are captured all the same."""
    negative = histogram(torch.tensor([-1.0, -3.0]))
    assert negative.capture() == []
    assert negative.capture_by_magnitude()[-1] == 1
    assert histogram().quantiles() == {}
    assert histogram(torch.zeros(3)).capture_by_magnitude() == []


def test_budgets_are_those_that_a_fraction_allows() -> None:
    """Rounded down, never below one, as `count_of` does."""
    from dualsft.allocators import count_of

    for available in (1, 7, 100, 1234):
        due = [count_of("budget", percent / 100, available, "things") for percent in range(1, 101)]
        assert budget_counts(available) == due


def test_what_the_best_hold_is_told_of_no_more_than_were_asked_for() -> None:
    """By the largest whole percent that is no more, and by nothing below the first: a budget is not rounded up."""
    capture = [percent / 100 for percent in range(1, 101)]
    figures = ScoreFigures(scored=18, selected=6, selected_positive=6, score_sum=1.0, positive_share=1.0,
                           positive_sum=1.0, captured=0.5, quantiles={}, capture=capture)  # fmt: skip
    assert figures.best(12) == (12, 0.72)  # 72% of 18 are 12.96
    assert replace(figures, scored=1000).best(12) == (10, 0.01)
    assert replace(figures, scored=1000).best(9) is None
    assert replace(figures, capture=[]).best(12) is None
