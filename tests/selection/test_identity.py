import pytest
import torch

from dualsft.errors import UserError
from dualsft.selection.directions import ColumnTotals, column_totals
from dualsft.selection.scoring import sum_identity


def test_both_sides_and_their_distance() -> None:
    """The sums are taken in float64, and their difference relative to Σ_j |φ_j|."""
    u = {"a": torch.tensor([[3.0, -1.0]]), "b": torch.tensor([4.0])}
    sums = {"a": torch.ones(1, 2), "b": torch.tensor([0.5])}
    found = sum_identity({0: 1.5, 7: 2.5 + 6e-5}, column_totals(u, sums), torch.float32)
    assert found == {
        "row_sum": pytest.approx(4.00006, rel=1e-12),
        "column_sum": 4.0,
        "relative_difference": pytest.approx(1e-5, rel=1e-6),
        "tolerance": 1e-4,
    }


def test_small_scores_beside_large_ones_are_not_lost() -> None:
    """A million scores of 1e-9 count beside one of 1."""
    u = {"w": torch.cat([torch.ones(1), torch.full((1_000_000,), 1e-9)])}
    totals = column_totals(u, {"w": torch.ones(1_000_001)})
    assert sum_identity({0: 1.001}, totals, torch.float32)["column_sum"] == pytest.approx(1.001, rel=1e-9)


@pytest.mark.parametrize(
    ("dtype", "off"),
    [(torch.float64, 2e-9), (torch.float32, 2e-4), (torch.bfloat16, 3e-2), (torch.float32, float("nan"))],
)
def test_a_broken_identity_stops_the_run(dtype: torch.dtype, off: float) -> None:
    """Sums that differ beyond the type's rounding, or are NaN, are an error that tells both."""
    with pytest.raises(UserError, match=r"add up to .* and the parameter scores to 1, which must be the same number"):
        sum_identity({0: 1.0 + off}, ColumnTotals(1.0, 1.0), dtype)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 5e-10), (torch.float32, 5e-5), (torch.bfloat16, 1e-2)])
def test_rounding_is_allowed(dtype: torch.dtype, off: float) -> None:
    """Within the type's tolerance the identity holds."""
    found = sum_identity({0: 1.0 + off}, ColumnTotals(1.0, 1.0), dtype)
    assert found["relative_difference"] == pytest.approx(off, rel=1e-3)


def test_nothing_scored_is_no_difference() -> None:
    """All scores zero is consistent."""
    assert sum_identity({0: 0.0}, ColumnTotals(0.0, 0.0), torch.float32)["relative_difference"] == 0.0
