"""A choice of entries built up in steps: the best of some tensors, then the best of others, until the budget is used.

Entries are not sorted. A float32 maps to an integer of the same order (its key), so the k-th largest entry of many
tensors is found exactly by two histograms of 65,536 bins, over the upper and then the lower half of the keys' bits.
Each is one sweep over the tensors. Memory holds the scores, one mask, and the keys of one tensor at a time.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dualsft.allocators.apportion import apportion
from dualsft.errors import UserError

By = Literal["magnitude", "signed"]
"""Rank by |φ|, or by φ itself."""

_BINS = 1 << 16
_LAST = torch.iinfo(torch.int32).min  # below the key of every float


def check_by(allocator: str, by: str) -> None:
    """Refuse an unknown ranking."""
    if by not in get_args(By):
        raise UserError(f"{allocator} ranks by 'magnitude' or 'signed', not by {by!r}.")


def ranked(score: Float[Tensor, "..."], by: By) -> Float[Tensor, "..."]:
    """The values that rank the entries: |φ|, or φ itself (no copy)."""
    return score.abs() if by == "magnitude" else score


class Choice:
    """The entries chosen so far; ties go to the first name, then the first flat index.

    Args:
        scores: Parameter name -> φ_j, of the parameter's shape.
        by: The ranking of entries.
        reverse: Whether the lowest are the best.

    Attributes:
        mask: Parameter name -> which entries are chosen, for every name in the scores.
    """

    def __init__(self, scores: Mapping[str, Float[Tensor, "..."]], by: By, reverse: bool = False) -> None:
        self._scores, self._by, self._reverse = scores, by, reverse
        self.mask: dict[str, Bool[Tensor, "..."]] = {
            name: torch.zeros(score.shape, dtype=torch.bool, device=score.device) for name, score in scores.items()
        }

    def free(self, names: Iterable[str]) -> int:
        """The number of entries of these tensors that are not chosen."""
        return sum(self.mask[name].numel() - int(self.mask[name].sum()) for name in names)

    def take(self, names: Iterable[str], k: int) -> None:
        """Choose the best k of these tensors' entries that are not chosen yet.

        Raises:
            ValueError: if there are fewer than k, or a score is NaN.
        """
        if k == 0:
            return
        names = sorted(names)
        threshold, ties = kth_largest(lambda: map(self._keys, names), k)
        if threshold == _LAST:
            raise ValueError(f"cannot choose {k} of {self.free(names)}")
        for name in names:
            keys = self._keys(name)
            chosen = keys > threshold
            at_threshold = (keys == threshold).nonzero().squeeze(1)[:ties]
            chosen[at_threshold] = True
            ties -= len(at_threshold)
            self.mask[name] |= chosen.view(self.mask[name].shape)

    def spread(self, groups: Sequence[Sequence[str]], shares: Sequence[int | float], budget: int) -> int:
        """Split a budget over disjoint groups of tensors by their shares, and take the best entries of each group.

        Args:
            groups: Names of tensors.
            shares: Finite and not negative. A group that is too small is filled, and leaves the rest to the others.
            budget: How many to choose.

        Returns:
            The number of entries chosen: fewer than the budget if the groups run out of entries.
        """
        free = [self.free(names) for names in groups]
        parts = apportion(min(budget, sum(free)), shares, free)
        for names, part in zip(groups, parts, strict=True):
            self.take(names, part)
        return sum(parts)

    def _keys(self, name: str) -> Int[Tensor, " entry"]:
        """int32 keys of a tensor's entries, flat, the larger the better; those of chosen entries are the lowest."""
        values = ranked(self._scores[name], self._by)
        keys = ordered_keys(-values if self._reverse else values)
        return keys.masked_fill_(self.mask[name].flatten(), _LAST)


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
    """Find the k-th largest int32 key of all tensors, and how many entries equal to it are among the k largest.

    Args:
        sweep: Yields the keys of one tensor after another; called twice.
        k: From 1 to the number of entries.

    Raises:
        ValueError: if there is no such entry.
    """
    half = _BINS // 2
    upper, k = _kth_bin(((keys >> 16) + half for keys in sweep()), k)
    lower, k = _kth_bin((keys[(keys >> 16) == upper - half] & (_BINS - 1) for keys in sweep()), k)
    return (upper - half) * _BINS + lower, k


def _kth_bin(digits: Iterable[Int[Tensor, " entry"]], k: int) -> tuple[int, int]:
    """The bin of the k-th largest digit, and its rank among that bin's entries."""
    counts = torch.as_tensor(sum(torch.bincount(part, minlength=_BINS).cpu() for part in digits))
    at_least = counts.flip(0).cumsum(0).flip(0)
    if k < 1 or k > int(at_least[0]):
        raise ValueError(f"cannot choose {k} of {int(at_least[0])}")
    bin_ = int((at_least >= k).nonzero()[-1])
    return bin_, k - int(at_least[bin_] - counts[bin_])
