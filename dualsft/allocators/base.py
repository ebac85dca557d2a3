"""Budgets, and the interface of allocators: the scores that they get and the choice that they return."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from dualsft.errors import UserError
from dualsft.needs import Given, by_own_name
from dualsft.sharding.groups import RankGroup, own_group

Budget = int | float | None
"""A count (integer), a fraction in (0, 1] (float), or None for everything."""


def check_budget(key: str, budget: Budget) -> None:
    """Refuse a budget that no pool could satisfy."""
    is_count = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1
    is_fraction = isinstance(budget, float) and 0 < budget <= 1
    if not (budget is None or is_count or is_fraction):
        raise UserError(
            f"{key} is {budget}; give a fraction above 0 and up to 1 (0.1 is a tenth), a count of at least 1 as an "
            "integer, or null for everything."
        )


def count_of(key: str, budget: Budget, available: int, of: str) -> int:
    """Return how many of the available items a budget allows: a fraction is rounded down, but never below one.

    Args:
        key: The option that gives the budget.
        budget: A checked budget; a count above the number available raises a UserError.
        available: How many items there are.
        of: The items' name in the plural, for errors.
    """
    if budget is None:
        return available
    if isinstance(budget, float):
        return min(available, max(1, math.floor(Decimal(str(budget)) * available)))
    if budget > available:
        raise UserError(f"{key} is {budget:,}, but there are only {available:,} {of}; lower it, or give null for all.")
    return budget


ExampleStatistic = Literal["loss", "gradient_norm", "preconditioned_gradient_norm", "sketch"]
"""Statistics that a data allocator may need besides the scores."""

ParameterStatistic = Literal["weight"]
"""Statistics that a parameter allocator may need besides the scores."""


@dataclass(frozen=True)
class ScoredExamples(Given):
    """The pool examples that may be selected, in source order.

    Fields that may be None are set if the allocator names them in its ``needs``. Gradients are those of the mean loss
    over an example's supervised tokens at the scoring checkpoint, over all weights.

    Attributes:
        example_id: Row numbers in the pool, ascending.
        score: φ_i, aligned with ``example_id``.
        num_tokens: Supervised tokens of each.
        records: The records themselves, aligned with ``example_id``.
        loss: l_i, the mean loss over the supervised tokens, in nats per token.
        gradient_norm: ‖g_i‖, the Euclidean norm of the gradient.
        preconditioned_gradient_norm: ‖P ⊙ g_i‖, with P the optimizer's diagonal preconditioner.
        sketch: S (√P ⊙ g_i), a random projection S to few dimensions with E[SᵀS] = 1: the product of two rows estimates
            g_iᵀ P g_k, by which a preconditioned step on one example lowers the loss of the other, per unit of η.
    """

    asked_for: ClassVar = by_own_name("loss", "gradient_norm", "preconditioned_gradient_norm", "sketch")

    example_id: Int[Tensor, " example"]
    score: Float[Tensor, " example"]
    num_tokens: Int[Tensor, " example"]
    records: Sequence[Mapping[str, object]]
    loss: Float[Tensor, " example"] | None = None
    gradient_norm: Float[Tensor, " example"] | None = None
    preconditioned_gradient_norm: Float[Tensor, " example"] | None = None
    sketch: Float[Tensor, "example sketch"] | None = None


@dataclass(frozen=True, eq=False)
class ScoredParameters(Given, Mapping[str, Tensor]):
    """The parameters that may be trained: a mapping of names to scores, with the weights if the allocator needs them.

    Attributes:
        score: Parameter name -> φ_j, float32, of the parameter's shape.
        weight: Parameter name -> the base model's weights, of the same shape, in the type that they are stored in; None
            unless the allocator names it in its ``needs``.
        group: The ranks that choose together, where several do.
    """

    asked_for: ClassVar = by_own_name("weight")

    score: Mapping[str, Float[Tensor, "..."]]
    weight: Mapping[str, Float[Tensor, "..."]] | None = None
    group: RankGroup | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.score[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.score)

    def __len__(self) -> int:
        return len(self.score)


def group_of(scores: Mapping[str, Tensor]) -> RankGroup:
    """The ranks that choose together by these scores: this one alone, if nothing else is said."""
    return (scores.group if isinstance(scores, ScoredParameters) else None) or own_group()


def check_any_positive(allocator: str, score: Float[Tensor, " example"]) -> None:
    """Refuse scores without a positive one, for an allocator that chooses only positive scores."""
    if not bool((score > 0).any()):
        raise UserError(
            f"None of the {len(score):,} scored examples has a positive score, and {allocator} takes no others; choose "
            "another allocator."
        )


class ParameterAllocator(ABC):
    """A rule that chooses weights by their scores, exactly as many as the parameter budget.

    Attributes:
        needs: What ``allocate`` uses besides the scores; an allocator with options may set it in its constructor.
        together: Whether the ranks of a job can choose together, each in its own part of every tensor. It holds for
            the allocators of this package alone: rank zero calls any other, for all.
    """

    needs: tuple[ParameterStatistic, ...] = ()
    together: ClassVar[bool] = False

    @abstractmethod
    def allocate(self, scores: ScoredParameters, budget: int) -> Mapping[str, Bool[Tensor, "..."]]:
        """Choose exactly ``budget`` entries.

        Args:
            scores: Parameter name -> φ_j, float32, of the parameter's shape; with the statistics in ``needs``. Not to
                be modified.
            budget: How many entries to choose, at most their number.

        Returns:
            Parameter name -> which entries are chosen, for every name in ``scores``.
        """


class DataAllocator(ABC):
    """A rule that chooses examples within the data budget by their scores.

    Attributes:
        needs: What ``allocate`` uses besides the scores; an allocator with options may set it in its constructor.
        unit: The unit of the budget: examples, or supervised tokens, of which at most the budget may be chosen.
        exact: Whether exactly as many examples as the budget are chosen; otherwise from one to that many.
    """

    needs: tuple[ExampleStatistic, ...] = ()
    unit: Literal["examples", "tokens"] = "examples"
    exact: bool = True

    def check(self, records: Mapping[int, Mapping[str, object]]) -> None:  # noqa: B027
        """Refuse records that the allocator cannot choose from, before anything is scored; none by default.

        Args:
            records: Row number in the pool -> record, of every example that has something to learn.

        Raises:
            UserError: if a record lacks what the allocator reads.
        """

    @abstractmethod
    def allocate(self, examples: ScoredExamples, budget: int) -> Int[Tensor, " chosen"]:
        """Choose ``budget`` examples, or examples of at most ``budget`` supervised tokens.

        Args:
            examples: The examples to choose from, with the statistics in ``needs``. Not to be modified.
            budget: The number of examples or tokens, at most the number available.

        Returns:
            The chosen ``example_id``, ascending.
        """
