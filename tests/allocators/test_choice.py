import tracemalloc
from typing import Any

import pytest
import torch
from torch import Tensor

from dualsft.allocators.choice import Choice, ranked
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


def by_plain_sort(scores: dict[str, Tensor], k: int, by: str, reverse: bool) -> dict[str, Tensor]:
    """The choice by a stable sort of all entries in float64, tensors in the order of their names."""
    names = sorted(scores)
    values = torch.cat([ranked(scores[name], by).flatten() for name in names]).float().double()  # type: ignore[arg-type]
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[torch.sort(values, descending=not reverse, stable=True).indices[:k]] = True
    parts = chosen.split([scores[name].numel() for name in names])
    return {name: part.view(scores[name].shape) for name, part in zip(names, parts, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_many_blocks_and_a_sample_choose_what_a_sort_does(
    seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of many blocks, of one and of none, transposed ones too, of which a sample has every third entry."""
    monkeypatch.setattr("dualsft.allocators.choice.BLOCK", 50)
    monkeypatch.setattr("dualsft.allocators.choice.sampling_stride", lambda entries: 3)
    shapes = {"w": (12, 15), "b": (7,), "a": (), "none": (0, 3), **{f"n{k}": (3,) for k in range(5)}, "v": (99,)}
    scores = {name: score.to(dtype) for name, score in random_scores(seed, shapes).items()}
    scores["w"] = scores["w"].t()
    total = sum(score.numel() for score in scores.values())
    for by in ("magnitude", "signed"):
        for reverse in (False, True):
            for k in (1, 40 + 30 * seed, total):
                choice = Choice(scores, by, reverse)
                choice.take(scores, k)
                due = by_plain_sort(scores, k, by, reverse)
                assert all(torch.equal(choice.mask[name], due[name]) for name in scores)
                assert choice.free(scores) == total - k


def test_scores_of_one_value_go_by_name_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the borders of blocks, and past what is chosen already."""
    monkeypatch.setattr("dualsft.allocators.choice.BLOCK", 4)
    choice = Choice({"b": torch.zeros(3, 3), "a": -torch.zeros(6)}, "signed")
    choice.take(["b"], 2)
    choice.take(["b", "a"], 11)
    assert choice.mask["a"].all()
    assert choice.mask["b"].flatten().tolist() == [True] * 7 + [False] * 2


@pytest.mark.parametrize("by", ["magnitude", "signed"])
def test_memory_does_not_grow_with_the_scores(by: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside scores and mask it holds a block, a sample and the bins: here a quarter of the scores at most."""
    monkeypatch.setattr("dualsft.allocators.choice.BLOCK", 2**11)
    monkeypatch.setattr("dualsft.allocators.choice.sampling_stride", lambda entries: 65)
    monkeypatch.setattr("dualsft.allocators.threshold._BINS", 2**9)
    scores = {"w": torch.randn(2**9, 2**8, generator=torch.Generator().manual_seed(0))}
    tracemalloc.start()
    choice = Choice(scores, by)
    mask, _ = tracemalloc.get_traced_memory()
    choice.take(["w"], 2**13)
    choice.take(["w"], 2**13)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - mask < scores["w"].nbytes / 4
    assert int(choice.mask["w"].sum()) == 2**14
