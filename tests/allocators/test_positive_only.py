import pytest
import torch

from dualsft.allocators import PositiveOnly
from dualsft.errors import UserError
from tests.allocators.cases import scored


@pytest.mark.parametrize("seed", range(8))
def test_positive_only_equals_a_sort_cut_at_zero(seed: int) -> None:
    """For every budget, the ids of the highest scores above zero, ties to the earlier row, ascending, are chosen."""
    values = (2 * torch.randn(15, generator=torch.Generator().manual_seed(seed))).round().tolist()
    ranked = sorted((i for i in range(15) if values[i] > 0), key=lambda i: (-values[i], i))
    for budget in range(1, 16):
        expected = sorted(10 * (i + 1) for i in ranked[:budget])
        assert PositiveOnly().allocate(scored(values), budget).tolist() == expected


def test_without_a_positive_score_there_is_nothing_to_choose() -> None:
    """Zero is not positive; the error tells how many were looked at and what to change."""
    with pytest.raises(UserError, match=r"None of the 3 scored examples .* another allocator\.$"):
        PositiveOnly().allocate(scored([0.0, -0.0, -1.0]), 2)


def test_the_budget_is_the_most() -> None:
    """The class says that fewer examples than the budget may come back."""
    assert (PositiveOnly.exact, PositiveOnly.unit) == (False, "examples")
