"""Budgets spent: which weights and which examples, whatever the allocator, exactly as many as were due."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from dualsft.allocators import (
    Budget,
    DataAllocator,
    ExampleStatistic,
    ParameterAllocator,
    ParameterStatistic,
    ScoredExamples,
    ScoredParameters,
    count_of,
)
from dualsft.data import FormatOptions, Records
from dualsft.errors import UserError, blaming, naming
from dualsft.selection.answers import check_mask, checksum, integers
from dualsft.selection.near_duplicates import NearDuplicates, collapse
from dualsft.selection.parts import check_needs_known
from dualsft.selection.trainable import trainable_names

Measured = Mapping[str, Mapping[int, Tensor]]
"""Name of a statistic -> example id -> what was measured of it."""


@dataclass(frozen=True)
class WeightChoice:
    """How weights are chosen.

    Attributes:
        allocator: The rule.
        budget: As it was given; a fraction is one of the weights that may be trained.
        trainable: Patterns for the parameters that may be trained; empty for all.
        frozen: Patterns for those that may not even so.
        base: Gives the base model's weights by parameter name, if the allocator needs them.
    """

    allocator: ParameterAllocator
    budget: Budget
    trainable: Sequence[str] = ()
    frozen: Sequence[str] = ()
    base: Callable[[], Mapping[str, Tensor]] = dict

    def count(self, sizes: Mapping[str, int]) -> int:
        """How many weights are due.

        Args:
            sizes: Parameter name -> its number of weights.

        Raises:
            UserError: if that is more than may be trained, or a pattern is for nothing.
        """
        names = trainable_names(sizes, self.trainable, self.frozen)
        return count_of("model.parameter_budget", self.budget, sum(sizes[name] for name in names), "trainable weights")


@dataclass(frozen=True)
class ExampleChoice:
    """How examples are chosen.

    Attributes:
        allocator: The rule.
        budget: As it was given, in the allocator's unit.
        near_duplicates: Which texts say the same, so that one of them at most may be chosen.
    """

    allocator: DataAllocator
    budget: Budget
    near_duplicates: NearDuplicates = NearDuplicates()  # noqa: RUF009 (frozen)

    def count(self, num_tokens: Collection[int]) -> int:
        """How many examples, or supervised tokens, are due.

        Args:
            num_tokens: Supervised tokens of each example with a response.

        Raises:
            UserError: if that is more than there are.
        """
        by_token = self.allocator.unit == "tokens"
        available = sum(num_tokens) if by_token else len(num_tokens)
        return count_of("model.data_budget", self.budget, available, "supervised tokens" if by_token else "examples")


class ChosenExamples(NamedTuple):
    """What came of a choice of examples.

    Attributes:
        ids: Of the chosen ones.
        collapsed: How many others could not be chosen, as near-duplicates of one of a higher score.
    """

    ids: set[int]
    collapsed: int


@dataclass(frozen=True)
class Pool:
    """What is known of the examples beside their scores.

    Attributes:
        records: The records, by row number.
        num_tokens: Supervised tokens of each record.
        options: How a record is read.
    """

    records: Records
    num_tokens: Sequence[int] | np.ndarray
    options: FormatOptions


def check_allocators(weights: ParameterAllocator, examples: DataAllocator) -> None:
    """Refuse an allocator that asks for what nobody gives, before any work.

    Raises:
        UserError: naming it and what there is.
    """
    check_needs_known(weights, weights.needs, get_args(ParameterStatistic))
    check_needs_known(examples, examples.needs, get_args(ExampleStatistic))
    if examples.unit not in ("examples", "tokens"):
        raise UserError(f"{type(examples).__name__} has unit {examples.unit!r}; it is 'examples' or 'tokens'; mend it.")


def choose_weights(how: WeightChoice, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameter name -> which weights are chosen.

    Args:
        how: The rule and its budget.
        scores: Parameter name -> φ_j, float32, of the parameter's shape.

    Raises:
        UserError: if the budget cannot be met, or the allocator does not keep to it, or to the parameters.
    """
    budget = how.count({name: score.numel() for name, score in scores.items()})
    names = trainable_names(scores, how.trainable, how.frozen)
    given = {name: score for name, score in scores.items() if name in names}
    base = how.base() if "weight" in how.allocator.needs else None
    before = {name: checksum(score) for name, score in given.items()}
    with blaming(how.allocator, "allocate"):
        chosen = how.allocator.allocate(ScoredParameters(given, base), budget)
    if any(not torch.equal(before[name], checksum(score)) for name, score in given.items()):
        raise UserError(f"{type(how.allocator).__name__} modified the scores in place; mend it to work on a copy.")
    check_mask(type(how.allocator).__name__, chosen, given, budget)
    left_out = {name: torch.zeros_like(s, dtype=torch.bool) for name, s in scores.items() if name not in names}
    return {name: left_out[name] if name in left_out else chosen[name] for name in scores}


def choose_examples(
    how: ExampleChoice, due: int, scores: Mapping[int, float], pool: Pool, measured: Measured
) -> ChosenExamples:
    """The chosen examples; non-finite ones and near-duplicates may lower what a fraction buys.

    Args:
        how: The rule and its budget.
        due: How many examples, or supervised tokens, that is.
        scores: Example id -> φ_i, of the examples that could be scored.
        pool: The examples.
        measured: What the allocator needs beside.

    Raises:
        UserError: if a count was asked for and too few examples are finite, or differ, or none is finite, or the
            allocator does not keep to the budget.
    """
    if not scores:
        raise UserError("No example of data.train has a finite loss and gradient at the scoring checkpoint.")
    ids = collapse(how.near_duplicates, list(scores), scores, pool.records, pool.options)
    collapsed = len(scores) - len(ids)
    spent = {i: int(pool.num_tokens[i]) if how.allocator.unit == "tokens" else 1 for i in ids}
    available = sum(spent.values())
    if isinstance(how.budget, int) and due > available:
        what = "supervised tokens are in examples that" if how.allocator.unit == "tokens" else "examples"
        others = f" once {collapsed:,} near-duplicates are collapsed" if collapsed else ""
        raise UserError(
            f"model.data_budget is {due:,}, but only {available:,} {what} have finite scores{others}; lower it."
        )
    budget = min(due, available)
    options = f"model.data_allocator, with model.data_budget at {budget:,} {how.allocator.unit}"
    with naming(options), blaming(how.allocator, "allocate"):
        answer = how.allocator.allocate(_scored(how.allocator, ids, scores, pool, measured), budget)
    chosen = integers(type(how.allocator).__name__, answer)
    _check_chosen(how.allocator, chosen, spent, budget)
    return ChosenExamples(set(chosen), collapsed)


def _scored(
    allocator: DataAllocator, ids: Sequence[int], scores: Mapping[int, float], pool: Pool, measured: Measured
) -> ScoredExamples:
    return ScoredExamples(
        torch.tensor(ids),
        torch.tensor([scores[i] for i in ids], dtype=torch.float64),
        torch.tensor([int(pool.num_tokens[i]) for i in ids]),
        _Rows(pool.records, list(ids)),
        **{name: torch.stack([measured[name][i] for i in ids]) for name in sorted(allocator.needs)},
    )


def _check_chosen(allocator: DataAllocator, chosen: Sequence[int], spent: Mapping[int, int], budget: int) -> None:
    """See that an allocator kept to the pool and to its budget.

    Raises:
        UserError: naming it.
    """
    ids = set(chosen) & set(spent)
    total = sum(spent[i] for i in ids)
    fits = total == budget if allocator.exact and allocator.unit == "examples" else 0 < total <= budget
    if not (len(chosen) == len(ids) and fits):
        raise UserError(
            f"{type(allocator).__name__} chose {len(chosen):,} examples, {len(ids):,} different ones of the pool with "
            f"{total:,} {allocator.unit}, where {budget:,} were due; mend the allocator."
        )


class _Rows(Sequence[Mapping[str, Any]]):
    """Some of the records, read when they are asked for."""

    def __init__(self, records: Records, ids: list[int]) -> None:
        self._records, self._ids = records, ids

    def __getitem__(self, k: Any) -> Any:
        return self._records[self._ids[k]]

    def __len__(self) -> int:
        return len(self._ids)
