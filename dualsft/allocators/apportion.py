"""Splits a budget over groups in proportion to shares, in integers that add up to the budget exactly.

The method of largest remainders: every group gets its share rounded down, and the rest goes, one each, to the groups
with the largest fractions. A group that is too small for its share is filled, and the others share the remainder.
"""

from collections.abc import Sequence
from fractions import Fraction


def apportion(budget: int, shares: Sequence[int | float], capacities: Sequence[int]) -> list[int]:
    """Split a budget over groups.

    Args:
        budget: The total, at most the sum of the capacities.
        shares: Numbers that the groups' parts are proportional to; finite and not negative. If all groups with a share
            are full, the others split the rest evenly.
        capacities: The most that each group can take.

    Returns:
        Integers that add up to the budget; among equal remainders the first group's is rounded up.

    Raises:
        ValueError: if the groups cannot take the budget.
    """
    if not 0 <= budget <= sum(capacities):
        raise ValueError(f"cannot split {budget} over groups that take {sum(capacities)}")
    parts = [0] * len(shares)
    left, open_ = budget, [k for k, capacity in enumerate(capacities) if capacity > 0]
    while left:
        exact = _ideal(left, [shares[k] for k in open_])
        full = [k for k, part in zip(open_, exact, strict=True) if part >= capacities[k]]
        if not full:
            return _round(parts, left, open_, exact)
        for k in full:
            parts[k] = capacities[k]
            left -= capacities[k]
        open_ = [k for k in open_ if parts[k] < capacities[k]]
    return parts


def _ideal(budget: int, shares: Sequence[int | float]) -> list[Fraction]:
    weights = list(map(Fraction, shares)) if any(shares) else [Fraction(1)] * len(shares)
    total = sum(weights)
    return [budget * weight / total for weight in weights]


def _round(parts: list[int], budget: int, groups: Sequence[int], exact: Sequence[Fraction]) -> list[int]:
    """Round down, then up for the largest remainders; a group below its capacity has room for one more."""
    for k, part in zip(groups, exact, strict=True):
        parts[k] = int(part)
    by_remainder = sorted(zip(exact, groups, strict=True), key=lambda pair: (int(pair[0]) - pair[0], pair[1]))
    for _, k in by_remainder[: budget - sum(int(part) for part in exact)]:
        parts[k] += 1
    return parts
