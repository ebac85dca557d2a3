"""The check that an integral along a path is complete: it must give the falls of the losses from end to end.

Σ_j M_ij = l_i(θ_0) − l_i(θ_K)        the fundamental theorem of calculus, for every example i
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from dualsft.matrix.example_values import ExampleValues


@dataclass(frozen=True)
class Completeness:
    """How far the integral is from the falls of the losses.

    Attributes:
        pieces: How many pieces the path was cut into.
        fall: Σ_i (l_i(θ_0) − l_i(θ_K)).
        row_sum: Σ_i φ_i.
        row_error: Σ_i |φ_i − (l_i(θ_0) − l_i(θ_K))| as a share of Σ_i |l_i(θ_0) − l_i(θ_K)|.
        column_sum: Σ_j φ_j; None without columns.
        column_error: How far it is from Σ_i (l_i(θ_0) − l_i(θ_K)), as the same share.
        tolerance: The largest error that was asked for.
        reached: Whether the errors are within the tolerance.
    """

    pieces: int
    fall: float
    row_sum: float
    row_error: float
    column_sum: float | None
    column_error: float | None
    tolerance: float
    reached: bool


def completeness(
    rows: ExampleValues, fall: ExampleValues, column_sum: float | None, pieces: int, tolerance: float
) -> Completeness:
    """Compare the rows, and the sum of the columns if there are any, with the falls of the examples' losses."""
    falls = fall.at(rows.ids)
    size, whole, row_sum = _sum(abs(falls)), _sum(falls), _sum(rows.numbers)
    row_error = _share(_sum(abs(rows.numbers - falls)), size)
    column_error = None if column_sum is None else _share(abs(column_sum - whole), size)
    reached = max(row_error, column_error or 0.0) <= tolerance
    return Completeness(pieces, whole, row_sum, row_error, column_sum, column_error, tolerance, reached)


def _sum(values: Float[np.ndarray, " example"]) -> float:
    return math.fsum(values.data)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
