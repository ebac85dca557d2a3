"""Budgets, and what an allocator is given and gives back."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from dualsft.errors import UserError

Budget = int | float | None
"""A count (integer), a fraction in (0, 1] (float), or None for everything."""


def check_budget(key: str, budget: Budget) -> None:
    """Refuse a budget that no pool could satisfy.

    Raises:
        UserError: naming the key and the value.
    """
    if budget is None:
        return
    whole = isinstance(budget, int) and not isinstance(budget, bool)
    if (whole and budget >= 1) or (isinstance(budget, float) and 0 < budget <= 1):
        return
    raise UserError(
        f"{key} is {budget}; give a fraction above 0 and up to 1 (0.1 is a tenth), a count of at least 1 as an "
        "integer, or null for everything."
    )


def count_of(key: str, budget: Budget, available: int) -> int:
    """How many of the available items a budget buys: a fraction is rounded down, but never below one.

    Raises:
        UserError: if the budget is a count above what there is.
    """
    if budget is None:
        return available
    if isinstance(budget, float):
        return min(available, max(1, math.floor(Decimal(str(budget)) * available)))
    if budget > available:
        raise UserError(f"{key} is {budget:,}, but there are only {available:,}; lower it, or give null for all.")
    return budget


@dataclass(frozen=True)
class ScoredExamples:
    """The pool examples that may be selected, in source order.

    Attributes:
        example_id: Row numbers in ``data.train``, ascending.
        score: φ_i, aligned with ``example_id``.
        num_tokens: Supervised tokens of each.
        records: The records themselves, aligned with ``example_id``.
    """

    example_id: Int[Tensor, " example"]
    score: Float[Tensor, " example"]
    num_tokens: Int[Tensor, " example"]
    records: Sequence[Mapping[str, object]]


class ParameterAllocator(ABC):
    """A rule that spends the parameter budget on the parameter scores."""

    @abstractmethod
    def allocate(self, scores: Mapping[str, Float[Tensor, "..."]], budget: int) -> dict[str, Bool[Tensor, "..."]]:
        """Choose exactly ``budget`` entries.

        Args:
            scores: Parameter name -> φ_j, float32, of the parameter's shape.
            budget: How many entries to choose, at most their number.

        Returns:
            Parameter name -> which entries are chosen, for every name in ``scores``.
        """


class DataAllocator(ABC):
    """A rule that spends the data budget on the example scores."""

    @abstractmethod
    def allocate(self, examples: ScoredExamples, budget: int) -> Int[Tensor, " chosen"]:
        """Choose exactly ``budget`` examples.

        Returns:
            The chosen ``example_id``, ascending.
        """
