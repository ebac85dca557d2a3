"""The sum identity Σ_i φ_i = Σ_j φ_j, an end-to-end check of both score vectors, which every run makes."""

import math
from collections.abc import Mapping

import torch

from dualsft.errors import UserError
from dualsft.selection.directions import ColumnTotals

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_PRECISION_TOLERANCE = 2e-2


def sum_identity(rows: Mapping[int, float], columns: ColumnTotals, dtype: torch.dtype) -> dict[str, float]:
    """Both sides of Σ_i φ_i = Σ_j φ_j, the predicted improvement, and how far apart they are.

    The difference is told relative to Σ_j |φ_j|, the size of the numbers that were added.

    Args:
        rows: Example id -> φ_i.
        columns: What the φ_j add up to.
        dtype: The type that activations have, which decides how close the sums must be.

    Raises:
        UserError: if they differ by more than rounding: then the scores are wrong, and nothing may be built on them.
    """
    row_sum = math.fsum(rows.values())
    column_sum = columns.total
    difference = abs(row_sum - column_sum) / columns.size if columns.size else 0.0
    tolerance = _TOLERANCE.get(dtype, _HALF_PRECISION_TOLERANCE)
    if not difference <= tolerance:
        raise UserError(
            f"The example scores add up to {row_sum:.6g} and the parameter scores to {column_sum:.6g}, which must be "
            f"the same number (difference {difference:.2g} of the scores' size, {tolerance:g} allowed for {dtype}); "
            "the model uses a weight in a way that cannot be seen from its module, or the gradients overflow: please "
            "report it."
        )
    return {"row_sum": row_sum, "column_sum": column_sum, "relative_difference": difference, "tolerance": tolerance}
