import pytest
import torch

from dualsft.allocators.choice import check_by, ranked
from dualsft.errors import UserError


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
