from typing import Any

import pytest
import torch

from dualsft.allocators import GlobalTopK, TopK
from dualsft.errors import UserError
from tests.allocators.cases import best, budgets, entries, random_scores, scored

SHAPES = {"b": (3, 5), "a.z": (7,), "a": (2, 2, 3)}
"""In no order of name."""


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("by", ["magnitude", "signed"])
@pytest.mark.parametrize("seed", range(24))
def test_global_top_k_equals_a_sort(seed: int, by: Any, reverse: bool) -> None:
    """For k from 1 to all, exactly k entries are chosen, those of a sort with ties by name and flat index."""
    scores = random_scores(seed, SHAPES)
    for k in budgets(34, seed, by, reverse):
        mask = GlobalTopK(by, reverse).allocate(scores, k)
        assert entries(mask, scores) == best(scores, scores, k, by, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("by", ["magnitude", "signed"])
def test_ties_go_to_the_first_name_and_index(by: Any, reverse: bool) -> None:
    """Among equal scores the first by name wins, whatever the order of the mapping, then the first by flat index."""
    mask = GlobalTopK(by, reverse).allocate({"z": torch.ones(3), "m": torch.ones(2, 2)}, 5)
    assert mask["m"].all()
    assert mask["z"].tolist() == [True, False, False]


def test_magnitude_and_sign() -> None:
    """A large negative score is the first by magnitude and the last by sign; magnitude is the default."""
    scores = {"w": torch.tensor([1.0, -3.0, 2.0])}
    assert GlobalTopK().allocate(scores, 1)["w"].tolist() == [False, True, False]
    assert GlobalTopK("signed").allocate(scores, 2)["w"].tolist() == [True, False, True]


def test_reverse_chooses_the_lowest() -> None:
    """By magnitude the smallest |φ| wins, signed the most negative φ."""
    scores = {"w": torch.tensor([1.0, -3.0, 2.0])}
    assert GlobalTopK(reverse=True).allocate(scores, 1)["w"].tolist() == [True, False, False]
    assert GlobalTopK("signed", reverse=True).allocate(scores, 2)["w"].tolist() == [True, True, False]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("by", ["magnitude", "signed"])
def test_the_two_zeros_are_a_tie(by: Any, reverse: bool) -> None:
    """-0.0 and 0.0 rank alike either way round: the first index wins, exactly as many as are due."""
    for zeros in ([-0.0, 0.0, -0.0], [0.0, -0.0, 0.0]):
        mask = GlobalTopK(by, reverse).allocate({"w": torch.tensor(zeros)}, 2)
        assert mask["w"].tolist() == [True, True, False]
        values = torch.tensor(zeros, dtype=torch.float64)
        assert TopK(reverse).allocate(scored(values), 2).tolist() == [10, 20]


def test_scores_are_left_as_they_are() -> None:
    """Ranking by magnitude, or in reverse, does not change the scores."""
    scores = {"w": torch.tensor([1.0, -3.0, 2.0])}
    GlobalTopK("magnitude").allocate(scores, 2)
    GlobalTopK("signed", reverse=True).allocate(scores, 2)
    assert scores["w"].tolist() == [1.0, -3.0, 2.0]


def test_nan_has_no_place() -> None:
    """NaN scores are an error, not a rank."""
    with pytest.raises(ValueError, match="NaN"):
        GlobalTopK().allocate({"w": torch.tensor([1.0, torch.nan])}, 1)


def test_unknown_ranking_is_refused() -> None:
    """Value and allowed set are told, unless annotations are checked at run time, which is a refusal as well."""
    with pytest.raises((UserError, TypeError), match=r"'magnitude'.*'signed'"):
        GlobalTopK("size")  # type: ignore[arg-type]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_top_k_equals_a_sort(seed: int, reverse: bool) -> None:
    """For every k, the ids of the k highest (or lowest) signed scores, ties to the earlier row, ascending."""
    values = random_scores(seed, SHAPES)["b"].flatten().double()
    sign = 1 if reverse else -1
    for k in range(1, len(values) + 1):
        ranked = sorted(range(len(values)), key=lambda i: (sign * values[i].item(), i))[:k]
        assert TopK(reverse).allocate(scored(values), k).tolist() == sorted(10 * (i + 1) for i in ranked)


def test_top_k_tells_float64_scores_apart() -> None:
    """Scores that are equal in float32 still rank by their difference."""
    assert TopK().allocate(scored(torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)), 1).tolist() == [20]
