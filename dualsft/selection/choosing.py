"""Budgets spent: which weights and which examples, whatever the allocator, exactly as many as were due."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualsft.allocators import Budget, DataAllocator, ParameterAllocator, ScoredExamples, ScoredParameters
from dualsft.data import Records
from dualsft.errors import UserError, blaming


def choose_weights(allocator: ParameterAllocator, scores: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
    """Parameter name -> which weights are chosen.

    Args:
        allocator: The rule.
        scores: Parameter name -> φ_j, float32, of the parameter's shape.
        budget: How many weights to choose.

    Raises:
        UserError: if the allocator does not keep to the budget, or to the parameters.
    """
    versions = {name: score._version for name, score in scores.items()}
    with blaming(allocator, "allocate"):
        mask = allocator.allocate(ScoredParameters(scores), budget)
        mask = {name: torch.as_tensor(mask[name], dtype=torch.bool) for name in mask}
    if versions != {name: score._version for name, score in scores.items()}:
        raise UserError(f"{type(allocator).__name__} modified the scores in place; mend it to work on a copy.")
    count = sum(int(chosen.sum()) for chosen in mask.values())
    if count != budget or {n: m.shape for n, m in mask.items()} != {n: s.shape for n, s in scores.items()}:
        raise UserError(
            f"{type(allocator).__name__} chose {count:,} weights of {len(mask)} parameters where {budget:,} of "
            f"{len(scores)} were due; mend the allocator."
        )
    return mask


def choose_examples(
    allocator: DataAllocator,
    scores: Mapping[int, float],
    num_tokens: Sequence[int] | np.ndarray,
    records: Records,
    budget: int,
    asked: Budget,
) -> set[int]:
    """Ids of the chosen examples; non-finite ones may lower what a fraction buys.

    Args:
        allocator: The rule.
        scores: Example id -> φ_i, of the examples that could be scored.
        num_tokens: Supervised tokens of every record of the pool.
        records: The pool.
        budget: How many examples to choose.
        asked: The budget as it was given.

    Raises:
        UserError: if a count was asked for and too few examples are finite, or none is, or the allocator does not keep
            to the budget.
    """
    ids = sorted(scores)
    if not ids:
        raise UserError("No example of data.train has a finite loss and gradient at the scoring checkpoint.")
    if isinstance(asked, int) and budget > len(ids):
        raise UserError(
            f"model.data_budget is {budget:,}, but only {len(ids):,} examples have finite scores; lower it."
        )
    examples = ScoredExamples(
        torch.tensor(ids),
        torch.tensor([scores[i] for i in ids], dtype=torch.float64),
        torch.tensor([int(num_tokens[i]) for i in ids]),
        _Rows(records, ids),
    )
    budget = min(budget, len(ids))
    with blaming(allocator, "allocate"):
        chosen = [int(i) for i in allocator.allocate(examples, budget)]
    distinct = len(set(chosen) & set(ids))
    if not len(chosen) == distinct == budget:
        raise UserError(
            f"{type(allocator).__name__} chose {len(chosen):,} examples, {distinct:,} different ones of the pool, "
            f"where {budget:,} were due; mend the allocator."
        )
    return set(chosen)


class _Rows(Sequence[Mapping[str, Any]]):
    """Some of the records, read when they are asked for."""

    def __init__(self, records: Records, ids: list[int]) -> None:
        self._records, self._ids = records, ids

    def __getitem__(self, k: Any) -> Any:
        return self._records[self._ids[k]]

    def __len__(self) -> int:
        return len(self._ids)
