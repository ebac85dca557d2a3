from typing import Any

import pytest

from dualsft.allocators import check_budget, count_of
from dualsft.errors import UserError


@pytest.mark.parametrize("budget", [None, 1, 10**12, 1.0, 0.5, 1e-9])
def test_budgets_that_some_pool_can_satisfy_are_taken(budget: Any) -> None:
    """Counts from 1, fractions in (0, 1] and null pass."""
    check_budget("model.data_budget", budget)
    assert count_of("model.data_budget", budget, 10**13, "examples") >= 1


@pytest.mark.parametrize("budget", [0, -1, 0.0, -0.1, 1.5, True, False, float("nan"), float("inf")])
def test_other_budgets_are_refused_by_key_and_value(budget: Any) -> None:
    """Nothing, negative amounts, more than all, booleans and NaN are errors that tell key and value."""
    with pytest.raises(UserError, match=rf"^model\.data_budget is {budget};"):
        check_budget("model.data_budget", budget)


@pytest.mark.parametrize(
    ("budget", "available", "count"),
    [
        (None, 7, 7),
        (3, 7, 3),
        (7, 7, 7),
        (1.0, 7, 7),
        (0.5, 7, 3),
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996 in binary
        (0.57, 100, 57),
        (0.07, 100, 7),
        (1e-6, 7, 1),
        (0.1, 123_456_789, 12_345_678),
        (0.1, 70_000_000_000, 7_000_000_000),
        (1.0, 0, 0),
    ],
)
def test_what_a_budget_buys(budget: Any, available: int, count: int) -> None:
    """A fraction is taken in decimal and rounded down, but buys at least one; a count buys itself; null buys all."""
    assert count_of("model.data_budget", budget, available, "examples") == count


def test_the_integer_one_is_not_the_fraction_one() -> None:
    """1 is one, 1.0 is all."""
    assert (count_of("k", 1, 7, "items"), count_of("k", 1.0, 7, "items")) == (1, 7)


def test_a_count_above_what_there_is_is_refused() -> None:
    """Key, count and what there is are told."""
    with pytest.raises(UserError, match=r"model\.parameter_budget is 1,001, but there are only 1,000 weights"):
        count_of("model.parameter_budget", 1001, 1000, "weights")
