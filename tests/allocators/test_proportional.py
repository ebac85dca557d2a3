import math
from fractions import Fraction
from typing import Any

import pytest
import torch

from dualsft.allocators import Proportional
from dualsft.allocators.apportion import apportion
from dualsft.errors import UserError
from tests.allocators.cases import best, budgets, entries, random_scores

SHAPES = {"b": (3, 5), "a.z": (7,), "a": (2, 2, 3)}


@pytest.mark.parametrize("by", ["magnitude", "signed"])
@pytest.mark.parametrize("seed", range(6))
def test_the_best_of_each_tensor(seed: int, by: Any) -> None:
    """For budgets from 1 to all, each tensor has its part by its sum of positive scores, its best by a sort."""
    scores = random_scores(seed, SHAPES, kinds=3)
    names = sorted(scores)
    gains = [math.fsum(max(score, 0.0) for score in scores[name].flatten().tolist()) for name in names]
    for budget in budgets(34, seed, by):
        parts = apportion(budget, gains, [scores[name].numel() for name in names])
        expected = set().union(*(best(scores, [name], k, by) for name, k in zip(names, parts, strict=True)))
        assert entries(Proportional(by).allocate(scores, budget), scores) == expected


def test_parts_are_those_of_the_positive_score() -> None:
    """With room for all, a tensor's number is its share of the positive score rounded, whatever its negative scores."""
    scores = {name: torch.randn(40, 50, generator=torch.Generator().manual_seed(k)) for k, name in enumerate("abc")}
    scores["a"] -= 1.0
    mask = Proportional().allocate(scores, 100)
    positive = {name: sum(Fraction(x) for x in score.flatten().tolist() if x > 0) for name, score in scores.items()}
    for name in scores:
        assert abs(int(mask[name].sum()) - 100 * positive[name] / sum(positive.values())) < 1


def test_small_scores_are_not_lost_beside_large_ones() -> None:
    """A sum in float32 would not move from 2²⁴ on; in float64 each of the ones counts."""
    scores = {"a": torch.cat([torch.full((1,), 2.0**25), torch.ones(2**15)]), "b": torch.full((3,), 2.0**15)}
    gain = 2**25 + 2**15
    mask = Proportional().allocate(scores, 1026)
    assert int(mask["a"].sum()) == round(Fraction(1026 * gain, gain + 3 * 2**15))


def test_without_a_positive_score_parts_are_by_size() -> None:
    """Zeros and negative scores alone say nothing of the tensors; the best of each are taken all the same."""
    scores = {"a": torch.tensor([-3.0, -1.0, -2.0, 0.0]), "b": torch.tensor([-2.0, -1.0])}
    for budget, (a, b) in {1: ([3], []), 3: ([1, 3], [1]), 6: ([0, 1, 2, 3], [0, 1])}.items():
        chosen = Proportional().allocate(scores, budget)
        assert (chosen["a"].nonzero().flatten().tolist(), chosen["b"].nonzero().flatten().tolist()) == (a, b)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_cannot_be_added_up_is_refused(bad: float) -> None:
    """The tensor is named."""
    with pytest.raises(UserError, match=r"^The scores of b hold NaN or infinity"):
        Proportional().allocate({"a": torch.ones(2), "b": torch.tensor([1.0, bad])}, 1)


def test_unknown_ranking_is_refused() -> None:
    """As everywhere, unless annotations are checked at run time, which is a refusal as well."""
    with pytest.raises((UserError, TypeError), match=r"'magnitude'.*'signed'"):
        Proportional("size")  # type: ignore[arg-type]
