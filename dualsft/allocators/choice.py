"""A choice of entries built up in steps: the best of some tensors, then the best of others, until the budget is used.

Entries are not sorted: each step finds the value of the last entry that it takes (see `dualsft.allocators.threshold`)
and then goes over the tensors once more, to mark what is above. Beside the scores, which may lie in files, and one
mask, memory holds a block of entries and a sample of at most 2²⁰.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from dualsft.allocators.apportion import apportion
from dualsft.allocators.threshold import BLOCK, Blocks, Threshold, bracket, kth_largest, mark, sampling_stride
from dualsft.errors import UserError

By = Literal["magnitude", "signed"]
"""Rank by |φ|, or by φ itself."""


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
        scores: Parameter name -> φ_j, of the parameter's shape; ranked in float32.
        by: The ranking of entries.
        reverse: Whether the lowest are the best.
    """

    def __init__(self, scores: Mapping[str, Float[Tensor, "..."]], by: By, reverse: bool = False) -> None:
        self._scores, self._by, self._reverse = scores, by, reverse
        shapes = {name: score.shape for name, score in scores.items()}
        self._mask = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
        self._taken = dict.fromkeys(scores, 0)
        self._buffer = np.empty(BLOCK, np.float32)

    @property
    def mask(self) -> dict[str, Bool[Tensor, "..."]]:
        """Parameter name -> which entries are chosen, for every name in the scores, where the scores are."""
        return {name: mask.to(self._scores[name].device) for name, mask in self._mask.items()}

    def free(self, names: Iterable[str]) -> int:
        """The number of entries of these tensors that are not chosen."""
        return sum(self._mask[name].numel() - self._taken[name] for name in names)

    def take(self, names: Iterable[str], k: int) -> None:
        """Choose the best k of these tensors' entries that are not chosen yet.

        Raises:
            ValueError: if there are fewer than k, or a score is NaN.
        """
        if k == 0:
            return
        names = sorted(names)
        if not 0 < k <= (free := self.free(names)):
            raise ValueError(f"cannot choose {k} of {free}")
        within = bracket(self._sample(names), k, free)
        threshold = kth_largest(lambda: self._blocks(names), k, within)
        left = threshold.ties
        for name in names:
            left -= self._mark(name, threshold, left)

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

    def _sample(self, names: Sequence[str]) -> Float32[np.ndarray, " entry"]:
        """Every so many-th entry of these tensors, without those that are chosen."""
        stride = sampling_stride(sum(self._mask[name].numel() for name in names))
        sample = [np.zeros(0, np.float32)]
        for name in names:
            values = self._values(self._scores[name].flatten()[::stride])
            sample.append(values[~self._flat(name)[::stride]] if self._taken[name] else values)
        return np.concatenate(sample)

    def _blocks(self, names: Iterable[str]) -> Blocks:
        for name in names:
            mask = self._flat(name) if self._taken[name] else None
            for first, values in self._values_of(name):
                yield values, None if mask is None else mask[first : first + BLOCK]

    def _mark(self, name: str, threshold: Threshold, ties: int) -> int:
        """Choose a tensor's entries above the threshold, and the first of those at it; how many there are of these."""
        mask, before, taken = self._flat(name), ties, 0
        for first, values in self._values_of(name):
            chosen = mask[first : first + BLOCK]
            ties -= mark(chosen, values, threshold, ties)
            taken += int(np.count_nonzero(chosen))
        self._taken[name] = taken
        return before - ties

    def _flat(self, name: str) -> Bool[np.ndarray, " entry"]:
        return self._mask[name].view(-1).numpy()

    def _values_of(self, name: str) -> Iterator[tuple[int, Float32[np.ndarray, " entry"]]]:
        """The place of the first entry of each block of a tensor, and the block's values until the next is made."""
        score = self._scores[name].flatten()
        for first in range(0, len(score), BLOCK):
            part = score[first : first + BLOCK]
            yield first, self._values(part, self._buffer[: len(part)])

    def _values(
        self, score: Float[Tensor, " entry"], out: Float32[np.ndarray, " entry"] | None = None
    ) -> Float32[np.ndarray, " entry"]:
        """What ranks the entries, the larger the better; no copy of a float32 tensor on the host by φ itself."""
        values: Float32[np.ndarray, " entry"] = score.detach().cpu().float().numpy()
        if self._by == "magnitude":
            values = np.abs(values, out=out)
        return np.negative(values, out=out) if self._reverse else values
