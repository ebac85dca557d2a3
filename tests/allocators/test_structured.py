import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dualsft.allocators import Structured
from dualsft.errors import UserError
from tests.allocators.cases import budgets, entries, random_scores, value_of

SHAPES: dict[str, tuple[int, ...]] = {"b.norm": (4,), "c": (5, 3), "b": (2, 2, 3), "a": (3, 4)}
UNITS: list[tuple[Any, int]] = [("row", 64), ("column", 64), ("block", 2), ("block", 64), ("block", 1)]


def units_of(shape: tuple[int, ...], unit: str, block_size: int) -> list[list[int]]:
    """The flat indices of each unit of a tensor, in order."""
    *_, rows, columns = (1, *shape) if len(shape) > 1 else (1, *shape, 1)
    units: dict[tuple[int, int, int], list[int]] = {}
    for flat in range(math.prod(shape)):
        matrix, place = divmod(flat, rows * columns)
        row, column = divmod(place, columns)
        key = {"row": (row, 0), "column": (0, column), "block": (row // block_size, column // block_size)}[unit]
        units.setdefault((matrix, *key), []).append(flat)
    return [units[key] for key in sorted(units)]


def reference(scores: dict[str, Tensor], budget: int, unit: str, block_size: int, by: str) -> set[tuple[str, int]]:
    """Down a sorted list of all units: whole while they fit, then the best entries of one."""
    listed = []
    for name, score in scores.items():
        values = [value_of(x, by) for x in score.flatten().tolist()]
        for number, flat in enumerate(units_of(tuple(score.shape), unit, block_size)):
            listed.append((-math.fsum(values[k] for k in flat), name, number, [(-values[k], k) for k in flat]))
    chosen: set[tuple[str, int]] = set()
    for _, name, _, members in sorted(listed):
        chosen |= {(name, flat) for _, flat in sorted(members)[: budget - len(chosen)]}
    return chosen


@pytest.mark.parametrize("by", ["magnitude", "signed"])
@pytest.mark.parametrize(("unit", "block_size"), UNITS)
@pytest.mark.parametrize("seed", range(2))
def test_units_are_taken_down_a_ranking(seed: int, unit: Any, block_size: int, by: Any) -> None:
    """For budgets from 1 to all: whole units by summed score, then the best entries of the next, by sorts."""
    scores = random_scores(seed, SHAPES, kinds=2)
    allocator = Structured(unit, block_size, by)
    for budget in budgets(43, seed, unit, block_size, by):
        mask = allocator.allocate(scores, budget)
        assert entries(mask, scores) == reference(scores, budget, unit, block_size, by)


@pytest.mark.parametrize(("unit", "block_size"), UNITS)
@pytest.mark.parametrize("seed", range(3))
def test_one_unit_at_most_is_partial(seed: int, unit: Any, block_size: int) -> None:
    """Exactly the budget is spent, and all units but one are chosen whole or not at all, whatever the range."""
    scores = random_scores(seed, SHAPES)
    for budget in budgets(43, seed, unit, block_size):
        chosen = entries(Structured(unit, block_size).allocate(scores, budget), scores)
        assert len(chosen) == budget
        partial = 0
        for name, shape in SHAPES.items():
            for flat in units_of(shape, unit, block_size):
                partial += 0 < sum((name, k) in chosen for k in flat) < len(flat)
        assert partial <= 1


def test_rows_by_default_signed() -> None:
    """Slices of the last axis by Σφ: a large negative row is last, by magnitude it is first."""
    scores = {"w": torch.tensor([[1.0, 1.0], [-9.0, 2.0], [3.0, -2.0]])}
    assert Structured().allocate(scores, 2)["w"].tolist() == [[True, True], [False, False], [False, False]]
    assert Structured().allocate(scores, 3)["w"].tolist() == [[True, True], [False, False], [True, False]]
    assert Structured(by="magnitude").allocate(scores, 2)["w"][1].all()


def test_ties_go_to_the_first_name_unit_and_index() -> None:
    """Among equal sums the first by name wins, whatever the order of the mapping, then by unit, then by index."""
    mask = Structured("column").allocate({"z": torch.ones(2, 3), "m": -torch.ones(2), "n": torch.ones(2, 1)}, 5)
    assert mask["n"].all()
    assert mask["z"].tolist() == [[True, True, False], [True, False, False]]
    assert not mask["m"].any()


def test_the_two_zeros_are_a_tie() -> None:
    """A unit of -0.0 ranks with one of 0.0."""
    scores = {"w": torch.tensor([-0.0, 0.0, -0.0])}
    assert Structured().allocate(scores, 2)["w"].tolist() == [True, True, False]


def test_sums_are_in_float64() -> None:
    """In float32 the two rows would tie."""
    scores = {"w": torch.tensor([[2.0**24, 1.0, 0.0], [2.0**24, 1.0, 0.5]])}
    assert Structured().allocate(scores, 3)["w"][1].all()


def test_an_empty_tensor_has_no_units() -> None:
    """It does not disturb the others."""
    scores = {"a": torch.ones(0, 3), "b": torch.ones(2), "c": torch.ones(0)}
    assert entries(Structured().allocate(scores, 2), scores) == {("b", 0), ("b", 1)}


@pytest.mark.parametrize("row", [[1.0, torch.nan], [torch.inf, -torch.inf]])
def test_units_without_a_sum_are_refused(row: list[float]) -> None:
    """NaN, and infinities that cancel, are named by their tensor; one infinity is the first."""
    with pytest.raises(UserError, match=r"^The scores of w hold NaN or infinities"):
        Structured().allocate({"v": torch.ones(3), "w": torch.tensor([[1.0, 1.0], row])}, 1)
    assert Structured().allocate({"w": torch.tensor([[1.0, 1.0], [torch.inf, 1.0]])}, 2)["w"][1].all()


def test_scores_are_left_as_they_are() -> None:
    """Neither ranking changes them."""
    scores = random_scores(0, SHAPES)
    before = {name: score.clone() for name, score in scores.items()}
    for by in ("magnitude", "signed"):
        Structured("block", 2, by).allocate(scores, 7)
    assert all(torch.equal(before[name], score) for name, score in scores.items())


def test_contradictions_are_refused() -> None:
    """A block size without blocks, and sizes below 1, are told by value."""
    with pytest.raises(UserError, match=r"^block_size of structured is 32, but unit is 'row'; leave it out"):
        Structured("row", 32)
    with pytest.raises(UserError, match=r"^block_size of structured is 0; give at least 1\.$"):
        Structured("block", 0)


@pytest.mark.parametrize("options", [{"unit": "head"}, {"by": "size"}])
def test_unknown_options_are_refused(options: Any) -> None:
    """The allowed set is told, unless annotations are checked at run time, which is a refusal as well."""
    with pytest.raises((UserError, TypeError), match=r"'row'.*'column'.*'block'|'magnitude'.*'signed'"):
        Structured(**options)
