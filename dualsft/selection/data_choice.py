"""The data budget: which examples are trained on, at most as many as the budget says, whatever the allocator."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualsft.allocators import Budget, DataAllocator, ScoredExamples, count_of
from dualsft.data import FormatOptions, Records
from dualsft.errors import UserError, blaming
from dualsft.selection.near_duplicates import NearDuplicates, collapse

Measured = Mapping[str, Mapping[int, Tensor]]
"""Name of a statistic -> example id -> what was measured of it."""


@dataclass(frozen=True)
class DataChoice:
    """How examples are chosen.

    Attributes:
        allocator: The rule.
        budget: A number in the allocator's unit (examples or supervised tokens), a fraction of all, or None for all.
        near_duplicates: Which texts count as the same, so that one of them at most may be chosen.
    """

    allocator: DataAllocator
    budget: Budget
    near_duplicates: NearDuplicates = NearDuplicates()  # noqa: RUF009 (frozen)

    def count(self, num_tokens: Collection[int]) -> int:
        """Compute how many examples, or supervised tokens, the budget is.

        Args:
            num_tokens: Supervised tokens of each example with a response.

        Raises:
            UserError: if that is more than there are.
        """
        by_token = self.allocator.unit == "tokens"
        available = sum(num_tokens) if by_token else len(num_tokens)
        return count_of("model.data_budget", self.budget, available, "supervised tokens" if by_token else "examples")


class ChosenExamples(NamedTuple):
    """The result of a choice of examples.

    Attributes:
        ids: The ids of the chosen examples.
        collapsed: How many others could not be chosen, being near-duplicates of one with a higher score.
    """

    ids: set[int]
    collapsed: int


@dataclass(frozen=True)
class Pool:
    """The examples apart from their scores.

    Attributes:
        records: The records, by row number.
        num_tokens: Supervised tokens of each record.
        options: How a record is read.
    """

    records: Records
    num_tokens: Sequence[int] | np.ndarray
    options: FormatOptions


def choose_data(
    how: DataChoice, due: int, scores: Mapping[int, float], pool: Pool, measured: Measured
) -> ChosenExamples:
    """Choose examples by their scores; non-finite ones and near-duplicates may lower what a fraction buys.

    Args:
        how: The rule and its budget.
        due: How many examples, or supervised tokens, the budget is.
        scores: Example id -> φ_i, of the examples that could be scored.
        pool: The examples.
        measured: What else the allocator needs.

    Raises:
        UserError: if a count was asked for and too few examples are finite, or differ, or none is finite, or the
            allocator violates the budget.
    """
    if not scores:
        raise UserError("No example of data.train has a finite loss and gradient at the scoring checkpoint.")
    ids = collapse(how.near_duplicates, list(scores), scores, pool.records, pool.options)
    collapsed = len(scores) - len(ids)
    cost = {i: int(pool.num_tokens[i]) if how.allocator.unit == "tokens" else 1 for i in ids}
    available = sum(cost.values())
    if isinstance(how.budget, int) and due > available:
        what = "supervised tokens are in examples that" if how.allocator.unit == "tokens" else "examples"
        others = f" once {collapsed:,} near-duplicates are collapsed" if collapsed else ""
        raise UserError(
            f"model.data_budget is {due:,}, but only {available:,} {what} have finite scores{others}; lower it."
        )
    budget = min(due, available)
    with blaming(how.allocator, "allocate"):
        answer = how.allocator.allocate(_scored(how.allocator, ids, scores, pool, measured), budget)
    chosen = integers(type(how.allocator).__name__, answer)
    _check_chosen(how.allocator, chosen, cost, budget)
    return ChosenExamples(set(chosen), collapsed)


def _scored(
    allocator: DataAllocator, ids: Sequence[int], scores: Mapping[int, float], pool: Pool, measured: Measured
) -> ScoredExamples:
    return ScoredExamples(
        torch.tensor(ids),
        torch.tensor([scores[i] for i in ids], dtype=torch.float64),
        torch.tensor([int(pool.num_tokens[i]) for i in ids]),
        _LazyRecords(pool.records, list(ids)),
        **{name: torch.stack([measured[name][i] for i in ids]) for name in sorted(allocator.needs)},
    )


def _check_chosen(allocator: DataAllocator, chosen: Sequence[int], cost: Mapping[int, int], budget: int) -> None:
    """Check that an allocator chose different examples of the pool, within its budget.

    Raises:
        UserError: naming it.
    """
    ids = set(chosen) & set(cost)
    total = sum(cost[i] for i in ids)
    fits = total == budget if allocator.exact and allocator.unit == "examples" else 0 < total <= budget
    if not (len(chosen) == len(ids) and fits):
        raise UserError(
            f"{type(allocator).__name__} chose {len(chosen):,} examples, {len(ids):,} different ones of the pool with "
            f"{total:,} {allocator.unit}, where {budget:,} were due; mend the allocator."
        )


class _LazyRecords(Sequence[Mapping[str, Any]]):
    """Some of the records, read when they are asked for."""

    def __init__(self, records: Records, ids: list[int]) -> None:
        self._records, self._ids = records, ids

    def __getitem__(self, k: Any) -> Any:
        return self._records[self._ids[k]]

    def __len__(self) -> int:
        return len(self._ids)


def integers(allocator: str, chosen: object) -> list[int]:
    """Read the ids that a data allocator returned: a one-dimensional tensor of integers or any iterable of them.

    Raises:
        UserError: naming the allocator and what it gave.
    """
    if isinstance(chosen, Tensor):
        if chosen.dim() == 1 and not (chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool):
            return [int(i) for i in chosen.tolist()]
        told = f"a tensor of {chosen.dtype} and shape {list(chosen.shape)}"
    elif isinstance(chosen, Iterable) and not isinstance(chosen, (str, bytes, Mapping)):
        found = list(chosen)
        if all(hasattr(i, "__index__") and not isinstance(i, bool) for i in found):
            return [int(i) for i in found]
        told = f"a {type(chosen).__name__} that holds more than integers"
    else:
        told = f"a {type(chosen).__name__}"
    raise UserError(f"{allocator} gave back {told}, where a tensor of example ids is due, (chosen); mend it.")
