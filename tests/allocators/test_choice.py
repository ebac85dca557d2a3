from typing import Any

import pytest
import torch

from dualsft.allocators.choice import Choice
from tests.allocators.cases import best, entries, random_scores

SHAPES = {"c": (2, 3), "a": (5,), "b": (2, 2, 2)}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("by", ["magnitude", "signed"])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_what_is_not_chosen_yet(seed: int, by: Any, reverse: bool) -> None:
    """Whatever was taken of some tensors, the next are the best of the others' entries and of what was left."""
    scores = random_scores(seed, SHAPES)
    for first in range(0, 12, 2):
        for second in range(0, 14, 3):
            choice = Choice(scores, by, reverse)
            choice.take(["c", "a"], first)
            taken = best(scores, ["a", "c"], first, by, reverse=reverse)
            assert entries(choice.mask, scores) == taken
            due = min(second, choice.free(["b", "a"]))
            choice.take(["b", "a"], due)
            expected = taken | best(scores, ["a", "b"], due, by, taken, reverse)
            assert entries(choice.mask, scores) == expected
            assert choice.free(scores) == 19 - len(expected)


def test_spreading_stops_at_what_there_is() -> None:
    """Groups take in proportion to their shares, the small one leaves the rest, and the number taken is told."""
    scores = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([[1.0, -2.0]])}
    choice = Choice(scores, "signed")
    assert choice.spread([["a"], ["b"]], [3, 1], 2) == 2
    assert entries(choice.mask, scores) == {("a", 3), ("a", 2)}
    assert choice.spread([["a"], ["b"]], [0, 1], 3) == 3
    assert entries(choice.mask, scores) == {("a", 3), ("a", 2), ("a", 1), ("b", 0), ("b", 1)}
    assert choice.spread([["a"], ["b"]], [1, 1], 9) == 1
    assert choice.spread([], [], 9) == 0


def test_no_more_than_what_is_free_can_be_taken() -> None:
    """What is chosen already does not count, and nothing is chosen then."""
    choice = Choice({"a": torch.tensor([1.0, -torch.inf]), "b": torch.ones(2)}, "signed")
    choice.take(["a"], 1)
    with pytest.raises(ValueError, match="cannot choose 2 of 1"):
        choice.take(["a"], 2)
    assert choice.mask["a"].tolist() == [True, False]
    choice.take(["a"], 1)
    assert choice.mask["a"].all()


def test_nan_has_no_place() -> None:
    """NaN scores are an error, wherever they are among those to choose from."""
    choice = Choice({"a": torch.tensor([1.0, torch.nan]), "b": torch.ones(2)}, "signed")
    choice.take(["b"], 1)
    with pytest.raises(ValueError, match="NaN"):
        choice.take(["a", "b"], 1)
