"""The data budget: which examples are trained on, at most as many as the budget, under any allocator."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualsft.allocators import DataAllocator, ScoredExamples, count_of
from dualsft.data.options import FormatOptions
from dualsft.data.records import Records
from dualsft.errors import UserError, blaming, naming
from dualsft.matrix.example_values import ExampleValues
from dualsft.matrix.pass_result import Statistic
from dualsft.needs import ask
from dualsft.selection.near_duplicates import collapse
from dualsft.selection.settings import SelectionSettings

Measured = Mapping[str, Statistic]
"""Name of a statistic -> example id -> what was measured of it."""


class ChosenExamples(NamedTuple):
    """The ids of the chosen examples, and each near-duplicate that could not be chosen -> the one in its place."""

    ids: set[int]
    duplicate_of: dict[int, int]


class Pool(NamedTuple):
    """The records, the number of supervised tokens of each, and how a record is read."""

    records: Records
    num_tokens: Sequence[int] | np.ndarray
    options: FormatOptions


def data_budget(settings: SelectionSettings, num_tokens: np.ndarray) -> int:
    """Compute how many examples, or supervised tokens, the budget is, given the tokens of each example with a response.

    Raises:
        UserError: if that is more than there are.
    """
    unit = "supervised tokens" if settings.data_allocator.unit == "tokens" else "examples"
    available = len(num_tokens) if unit == "examples" else int(num_tokens.sum())
    return count_of("model.data_budget", settings.data_budget, available, unit)


def choose_data(
    settings: SelectionSettings, due: int, scores: Mapping[int, float], pool: Pool, measured: Measured
) -> ChosenExamples:
    """Choose examples by their scores; non-finite ones and near-duplicates may lower the number that a fraction allows.

    Args:
        settings: The allocator, the budget, and which texts count as the same.
        due: How many examples, or supervised tokens, the budget is.
        scores: Example id -> φ_i, for the examples that could be scored.
        pool: All examples, apart from their scores.
        measured: Statistics that the allocator needs.

    Raises:
        UserError: if a count was asked for and too few examples are finite, or differ, or none is finite, or the
            allocator violates the budget.
    """
    if not scores:
        raise UserError("No example of data.train has a finite loss and gradient at the scoring checkpoint.")
    allocator = settings.data_allocator
    duplicate_of = collapse(settings.near_duplicates, scores, pool.records, pool.options)
    values = ExampleValues.of(scores).without(duplicate_of)
    ids = np.sort(values.ids)
    tokens = np.asarray(pool.num_tokens, np.int64)[ids]
    cost = tokens if allocator.unit == "tokens" else np.ones_like(tokens)
    available = int(cost.sum())
    if isinstance(settings.data_budget, int) and due > available:
        what = "supervised tokens are in examples that" if allocator.unit == "tokens" else "examples"
        others = f" once {len(duplicate_of):,} near-duplicates are collapsed" if duplicate_of else ""
        raise UserError(
            f"model.data_budget is {due:,}, but only {available:,} {what} have finite scores{others}; lower it."
        )
    budget = min(due, available)
    scored = ScoredExamples(
        torch.from_numpy(ids),
        torch.from_numpy(values.at(ids)),
        torch.from_numpy(tokens),
        _LazyRecords(pool.records, ids),
        **{name: _aligned(measured[name], ids) for name in sorted(allocator.needs)},
    )
    options = f"model.data_allocator, with model.data_budget at {budget:,} {allocator.unit}"
    with naming(options):
        answer = ask(allocator, "allocate", scored, budget)
    chosen = integers(type(allocator).__name__, answer)
    _check_chosen(allocator, chosen, ids, cost, budget)
    return ChosenExamples(set(chosen), duplicate_of)


def _aligned(statistic: Statistic, ids: np.ndarray) -> Tensor:
    """A statistic of these examples: one number or vector each."""
    if isinstance(statistic, ExampleValues):
        return torch.from_numpy(statistic.at(ids))
    return torch.stack([statistic[i] for i in ids.tolist()])


def _check_chosen(
    allocator: DataAllocator, chosen: Sequence[int], ids: np.ndarray, cost: np.ndarray, budget: int
) -> None:
    """Check that an allocator chose distinct examples of the pool, within its budget.

    Args:
        allocator: The allocator.
        chosen: What it chose.
        ids: The examples that there are, ascending.
        cost: What each of them takes of the budget.
        budget: How much that may be.
    """
    known = np.isin(ids, np.array([i for i in chosen if 0 <= i <= ids[-1]], np.int64))
    found, total = int(known.sum()), int(cost[known].sum())
    fits = total == budget if allocator.exact and allocator.unit == "examples" else 0 < total <= budget
    if not (len(chosen) == found and fits):
        raise UserError(
            f"{type(allocator).__name__} chose {len(chosen):,} examples, {found:,} different ones of the pool with "
            f"{total:,} {allocator.unit}, where {budget:,} were due; mend the allocator."
        )


def check_records(settings: SelectionSettings, records: Records, ids: Sequence[int]) -> None:
    """Let the allocator refuse records that it cannot choose from."""
    allocator = settings.data_allocator
    with naming("model.data_allocator"), blaming(allocator, "check"):
        allocator.check(_RecordsByRow(records, ids))


class _RecordsByRow(Mapping[int, Mapping[str, Any]]):
    """Some of the records by row, read when they are asked for."""

    def __init__(self, records: Records, ids: Sequence[int]) -> None:
        self._records, self._ids = records, ids

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        return self._records.with_source(row)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


class _LazyRecords(Sequence[Mapping[str, Any]]):
    """Some of the records, read when they are asked for."""

    def __init__(self, records: Records, ids: np.ndarray) -> None:
        self._records, self._ids = records, ids

    def __getitem__(self, k: Any) -> Any:
        return self._records.with_source(int(self._ids[k]))

    def __len__(self) -> int:
        return len(self._ids)


def integers(allocator: str, chosen: object) -> list[int]:
    """Read the ids that a data allocator returned: a one-dimensional tensor of integers or any iterable of them."""
    if isinstance(chosen, Tensor):
        if chosen.dim() == 1 and not (chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool):
            return [int(i) for i in chosen.tolist()]
        what = f"a tensor of {chosen.dtype} and shape {list(chosen.shape)}"
    elif isinstance(chosen, Iterable) and not isinstance(chosen, (str, bytes, Mapping)):
        found = list(chosen)
        if all(hasattr(i, "__index__") and not isinstance(i, bool) for i in found):
            return [int(i) for i in found]
        what = f"a {type(chosen).__name__} that holds more than integers"
    else:
        what = f"a {type(chosen).__name__}"
    raise UserError(f"{allocator} gave back {what}, where a tensor of example ids is due, (chosen); mend it.")
