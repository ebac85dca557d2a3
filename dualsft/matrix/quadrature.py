"""Rules for the integral of a gradient along a path of straight pieces, and their refinement.

    l(θ_0) − l(θ_K) = Σ_k ∫_0^1 <∇l(θ_k − t u_k), u_k> dt,      u_k = θ_k − θ_{k+1}

    left         Σ f(j/m) / m                  error of order 1/m
    midpoint     Σ f((j + ½)/m) / m            error of order 1/m²
    trapezoid    left, with half of both ends  error of order 1/m²

for each piece in m equal parts. A refinement uses the sum so far: the first and the last rule double m, the midpoint
rule triples it, and only the new points are computed.
"""

from typing import Literal, NamedTuple

Rule = Literal["left", "midpoint", "trapezoid"]


class Point(NamedTuple):
    """A point of the path at which a gradient is taken.

    Attributes:
        position: Where it is: k + t is a share t of the way from θ_k to θ_{k+1}.
        shares: The pieces that it counts for, each with its weight.
    """

    position: float
    shares: tuple[tuple[int, float], ...]


class Level(NamedTuple):
    """One refinement of a rule.

    Attributes:
        parts: m, the parts of each piece.
        kept: The factor of the sum so far.
        points: The points that are added to it.
    """

    parts: int
    kept: float
    points: list[Point]


def level(rule: Rule, pieces: int, number: int) -> Level:
    """The rule's refinement of this number over so many pieces; number 0 is one part to a piece."""
    if number == 0:
        return Level(1, 0.0, _first(rule, pieces))
    growth, inner = (3, (1 / 6, 5 / 6)) if rule == "midpoint" else (2, (0.5,))
    before = growth ** (number - 1)
    after = growth * before
    points = [
        Point(k + (j + t) / before, ((k, 1 / after),)) for k in range(pieces) for j in range(before) for t in inner
    ]
    return Level(after, 1 / growth, points)


def _first(rule: Rule, pieces: int) -> list[Point]:
    if rule == "midpoint":
        return [Point(k + 0.5, ((k, 1.0),)) for k in range(pieces)]
    if rule == "left":
        return [Point(float(k), ((k, 1.0),)) for k in range(pieces)]
    inner = [Point(float(k), ((k - 1, 0.5), (k, 0.5))) for k in range(1, pieces)]
    return [Point(0.0, ((0, 0.5),)), *inner, Point(float(pieces), ((pieces - 1, 0.5),))]
