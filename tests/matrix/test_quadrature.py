"""Rules for integrals along paths of straight pieces, against the integrals of polynomials."""

import math
from typing import get_args

import pytest

from dualsft.matrix.quadrature import Rule, level

PIECES = 3


def integral(rule: Rule, number: int, degree: int) -> float:
    """∫_0^3 x^degree by the rule, refined so often, each level on top of the one before."""
    total = 0.0
    for k in range(number + 1):
        _, kept, points = level(rule, PIECES, k)
        total = kept * total + sum(p.position**degree * weight for p in points for _, weight in p.shares)
    return total


@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_refinement_is_the_rule_over_more_parts(rule: Rule, number: int) -> None:
    """Every level is the rule itself with each piece in ``parts`` equal ones."""
    parts = level(rule, PIECES, number).parts
    starts = [k + j / parts for k in range(PIECES) for j in range(parts)]
    value = {
        "left": lambda a, b: a**4,
        "midpoint": lambda a, b: ((a + b) / 2) ** 4,
        "trapezoid": lambda a, b: (a**4 + b**4) / 2,
    }[rule]
    expected = math.fsum(value(a, a + 1 / parts) / parts for a in starts)
    assert integral(rule, number, 4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("rule", "order"), [("left", 1), ("midpoint", 2), ("trapezoid", 2)])
def test_the_error_falls_at_the_rules_order(rule: Rule, order: int) -> None:
    """From one level to the next by growth^order, and linear functions are exact at order two."""
    exact = 3.0**5 / 5
    errors = [abs(integral(rule, number, 4) - exact) for number in (2, 3)]
    growth = level(rule, PIECES, 3).parts / level(rule, PIECES, 2).parts
    assert errors[0] / errors[1] == pytest.approx(growth**order, rel=0.05)
    assert (abs(integral(rule, 0, 1) - 4.5) < 1e-12) == (order == 2)
