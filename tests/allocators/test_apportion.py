import random
from fractions import Fraction

import pytest

from dualsft.allocators.apportion import apportion


@pytest.mark.parametrize("seed", range(20))
def test_parts_add_up_and_fit(seed: int) -> None:
    """Whatever the shares and capacities, the parts add up to the budget and none is above its capacity."""
    draw = random.Random(seed)
    capacities = [draw.randrange(0, 40) for _ in range(draw.randrange(1, 9))]
    shares = [draw.choice([0.0, draw.random()]) for _ in capacities]
    for budget in range(sum(capacities) + 1):
        parts = apportion(budget, shares, capacities)
        assert sum(parts) == budget
        assert all(0 <= part <= capacity for part, capacity in zip(parts, capacities, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_without_limits_a_part_is_its_share_rounded(seed: int) -> None:
    """With room for all, each part is its exact share rounded down or up, and no larger remainder is rounded down."""
    draw = random.Random(seed)
    shares = [draw.random() for _ in range(6)]
    exact = [100 * Fraction(share) / sum(map(Fraction, shares)) for share in shares]
    parts = apportion(100, shares, [1000] * 6)
    remainders = [(part - int(part), parts[k] - int(part)) for k, part in enumerate(exact)]
    assert {up for _, up in remainders} <= {0, 1}
    assert min([r for r, up in remainders if up], default=1) >= max([r for r, up in remainders if not up], default=0)


def test_what_a_full_group_leaves_is_shared_again() -> None:
    """A group that cannot take its share is filled, the others split the rest in proportion."""
    assert apportion(100, [5, 3, 2], [10, 1000, 1000]) == [10, 54, 36]


def test_equal_shares_differ_by_one_at_most_and_the_first_get_more() -> None:
    """Ties go to the first groups."""
    assert apportion(11, [1, 1, 1, 1], [9] * 4) == [3, 3, 3, 2]


def test_groups_without_a_share_get_what_nobody_else_can_take() -> None:
    """Nothing of the budget is lost."""
    assert apportion(10, [0, 1, 0], [9, 4, 9]) == [3, 4, 3]
    assert apportion(3, [0, 1, 0], [9, 4, 9]) == [0, 3, 0]


def test_too_large_a_budget_is_refused() -> None:
    """There is no such split."""
    with pytest.raises(ValueError, match="cannot split 5 over groups that take 4"):
        apportion(5, [1, 1], [2, 2])
