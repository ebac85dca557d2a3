"""A budget split over groups by their shares, in whole numbers that add up to it exactly.

The method of largest remainders: every group gets its share rounded down, and what is left goes, one each, to the
largest fractions. A group that is too small for its share is filled, and the others share the remainder.
"""

from collections.abc import Sequence
from fractions import Fraction


def apportion(budget: int, shares: Sequence[int | float], capacities: Sequence[int]) -> list[int]:
    """How much of a budget each group gets.

    Args:
        budget: The total, at most the sum of the capacities.
        shares: What each group's part is in proportion to; finite and not negative. If all that have a share are full,
            the others share what is left evenly.
        capacities: The most that each group can take.

    Returns:
        Whole numbers that add up to the budget; of equal remainders the first group's is rounded up.

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
    """Rounded down, and up again for the largest remainders; below its capacity, no group is overfilled by that."""
    for k, part in zip(groups, exact, strict=True):
        parts[k] = int(part)
    by_remainder = sorted(zip(exact, groups, strict=True), key=lambda pair: (int(pair[0]) - pair[0], pair[1]))
    for _, k in by_remainder[: budget - sum(int(part) for part in exact)]:
        parts[k] += 1
    return parts
