"""The highest scores win (or the lowest, in reverse), exactly: a radix search for the k-th largest value, no sorting.

A float32 maps to an integer of the same order, so the k-th largest score is found by two histograms of 65,536 bins,
over the upper and then the lower half of its bits. Each is one sweep over the tensors, one tensor at a time.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dualsft.allocators.base import DataAllocator, ParameterAllocator, ScoredExamples
from dualsft.errors import UserError

_BINS = 1 << 16


class GlobalTopK(ParameterAllocator):
    """The weights with the highest scores over the whole model; ties go to the first name, then the first index.

    Args:
        by: ``magnitude`` ranks by |φ|, as the paper's release does; ``signed`` by φ itself.
        reverse: Choose the lowest instead, to see what the ranking is worth.
    """

    def __init__(self, by: Literal["magnitude", "signed"] = "magnitude", reverse: bool = False) -> None:
        if by not in ("magnitude", "signed"):
            raise UserError(f"global_top_k ranks by 'magnitude' or 'signed', not by {by!r}.")
        self.by, self.reverse = by, reverse

    def allocate(self, scores: Mapping[str, Float[Tensor, "..."]], budget: int) -> dict[str, Bool[Tensor, "..."]]:
        """Exactly ``budget`` entries; see `ParameterAllocator.allocate`."""
        ranked = _Ranked(scores, magnitude=self.by == "magnitude", negated=self.reverse)
        threshold, ties = kth_largest(ranked, budget)
        mask = {}
        for name in sorted(ranked):
            keys = ordered_keys(ranked[name])
            chosen = keys > threshold
            at_threshold = (keys == threshold).nonzero().squeeze(1)[:ties]
            chosen[at_threshold] = True
            ties -= len(at_threshold)
            mask[name] = chosen.view(scores[name].shape)
        return mask


class _Ranked(Mapping[str, Tensor]):
    """What the scores are ranked by, one tensor at a time, so that no second copy of all scores is held."""

    def __init__(self, scores: Mapping[str, Tensor], magnitude: bool, negated: bool) -> None:
        self._scores, self._magnitude, self._negated = scores, magnitude, negated

    def __getitem__(self, name: str) -> Tensor:
        value = self._scores[name].abs() if self._magnitude else self._scores[name]
        return -value if self._negated else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)


class TopK(DataAllocator):
    """The examples with the highest scores; ties go to the earlier row.

    Args:
        reverse: Choose the lowest instead, to see what the ranking is worth.
    """

    def __init__(self, reverse: bool = False) -> None:
        self.reverse = reverse

    def allocate(self, examples: ScoredExamples, budget: int) -> Int[Tensor, " chosen"]:
        """Exactly ``budget`` examples; see `DataAllocator.allocate`."""
        order = torch.sort(examples.score, descending=not self.reverse, stable=True).indices
        return examples.example_id[order[:budget]].sort().values


def ordered_keys(values: Float[Tensor, "..."]) -> Int[Tensor, " entry"]:
    """int32 keys, flat, in the order of the float32 values; -0.0 and 0.0 share one key.

    Raises:
        ValueError: if a value is NaN, which has no place in an order.
    """
    if bool(values.isnan().any()):
        raise ValueError("scores hold NaN")
    bits = (values.float() + 0.0).flatten().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def kth_largest(values: Mapping[str, Float[Tensor, "..."]], k: int) -> tuple[int, int]:
    """The key of the k-th largest value, and how many entries equal to it are still needed to make k.

    Raises:
        ValueError: if there are fewer than k values, or one is NaN.
    """
    half = _BINS // 2
    counts = sum(_histogram((ordered_keys(values[name]) >> 16) + half) for name in values)
    upper, k = _descend(torch.as_tensor(counts), k)
    counts = sum(_histogram(_lower_digits(ordered_keys(values[name]), upper - half)) for name in values)
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
