"""Ranking of scores, and the exact k-th largest entry of many tensors: a radix search, no sorting.

A float32 maps to an integer of the same order, so the k-th largest is found by two histograms of 65,536 bins, over the
upper and then the lower half of its bits. Each is one sweep over the tensors, one tensor at a time.
"""

from collections.abc import Callable, Iterable
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dualsft.errors import UserError

By = Literal["magnitude", "signed"]
"""Rank by |φ|, or by φ itself."""

_BINS = 1 << 16


def check_by(allocator: str, by: str) -> None:
    """Refuse an unknown ranking.

    Raises:
        UserError: naming the allocator, the value and what there is.
    """
    if by not in get_args(By):
        raise UserError(f"{allocator} ranks by 'magnitude' or 'signed', not by {by!r}.")


def ranked(score: Float[Tensor, "..."], by: By) -> Float[Tensor, "..."]:
    """|φ|, or φ itself (no copy)."""
    return score.abs() if by == "magnitude" else score


def ordered_keys(values: Float[Tensor, "..."]) -> Int[Tensor, " entry"]:
    """int32 keys, flat, in the order of the float32 values; -0.0 and 0.0 share one key, and no value has the key -2³¹.

    Raises:
        ValueError: if a value is NaN, which has no place in an order.
    """
    if bool(values.isnan().any()):
        raise ValueError("scores hold NaN")
    bits = (values.float() + 0.0).flatten().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def kth_largest(sweep: Callable[[], Iterable[Int[Tensor, " entry"]]], k: int) -> tuple[int, int]:
    """The k-th largest int32 key of all tensors, and how many entries equal to it are still needed to make k.

    Args:
        sweep: Yields the keys of one tensor after another whenever it is called, which is twice.
        k: From 1 to the number of entries.

    Raises:
        ValueError: if there is no such entry.
    """
    half = _BINS // 2
    counts = sum(_histogram((keys >> 16) + half) for keys in sweep())
    upper, k = _descend(torch.as_tensor(counts), k)
    counts = sum(_histogram(_lower_digits(keys, upper - half)) for keys in sweep())
    lower, k = _descend(torch.as_tensor(counts), k)
    return (upper - half) * _BINS + lower, k


def _lower_digits(keys: Int[Tensor, " entry"], upper: int) -> Int[Tensor, " inside"]:
    return keys[(keys >> 16) == upper] & (_BINS - 1)


def _histogram(digits: Int[Tensor, " entry"]) -> Int[Tensor, " bin"]:
    return torch.bincount(digits, minlength=_BINS).cpu()


def _descend(counts: Int[Tensor, " bin"], k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest, and its rank among that bin's entries."""
    at_least = counts.flip(0).cumsum(0).flip(0)
    if k < 1 or k > int(at_least[0]):
        raise ValueError(f"cannot choose {k} of {int(at_least[0])}")
    bin_ = int((at_least >= k).nonzero()[-1])
    return bin_, k - int(at_least[bin_] - counts[bin_])
