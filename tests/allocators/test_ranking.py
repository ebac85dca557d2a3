import pytest
import torch

from dualsft.allocators.choice import check_by, kth_largest, ordered_keys, ranked
from dualsft.errors import UserError
from tests.allocators.cases import SPECIAL


def test_keys_keep_the_order_of_floats() -> None:
    """Keys compare as their floats do; the two zeros share one; the lowest integer is below them all."""
    values = torch.cat([SPECIAL, torch.randn(100, generator=torch.Generator().manual_seed(0))])
    keys = ordered_keys(values)
    assert torch.equal(keys[:, None] < keys, values[:, None] < values)
    assert keys[0] == keys[1]
    assert keys.min() > torch.iinfo(torch.int32).min


def test_nan_has_no_key() -> None:
    """NaN is an error, not a rank."""
    with pytest.raises(ValueError, match="NaN"):
        ordered_keys(torch.tensor([1.0, torch.nan]))


@pytest.mark.parametrize("values", [[5.0, 2.0, 2.0, 2.0, 1.0], [1e-45, 0.0, -0.0, 0.0, -1e-45]])
def test_the_threshold_and_its_ties(values: list[float]) -> None:
    """The key is that of the k-th largest of all tensors, with how many entries equal to it make k."""
    keys = ordered_keys(torch.tensor(values))
    assert kth_largest(lambda: [keys[:2], keys[2:]], 3) == (int(keys[1]), 2)


@pytest.mark.parametrize("k", [0, 6])
def test_more_than_there_is_cannot_be_chosen(k: int) -> None:
    """K must lie between 1 and the number of entries."""
    with pytest.raises(ValueError, match=f"cannot choose {k} of 5"):
        kth_largest(lambda: [ordered_keys(torch.ones(5))], k)


def test_what_ranks() -> None:
    """Magnitude is the absolute score; signed is the score, not a copy of it."""
    score = torch.tensor([1.0, -3.0])
    assert ranked(score, "magnitude").tolist() == [1.0, 3.0]
    assert ranked(score, "signed") is score


def test_unknown_rankings_are_refused() -> None:
    """Allocator, value and allowed set are told."""
    check_by("mine", "signed")
    with pytest.raises(UserError, match=r"^mine ranks by 'magnitude' or 'signed', not by 'size'\.$"):
        check_by("mine", "size")
