"""A choice of entries built up in steps: the best of some tensors, then the best of others, until the budget is used.

Entries are not sorted: each step finds the value of the last entry that it takes (see `dualsft.allocators.threshold`)
and then goes over the tensors once more, to mark what is above. Beside the scores, which may lie in files, and one
mask, memory holds a block of entries and a sample of at most 2²⁰.

Several ranks can choose together: each looks at its own part of every tensor, whole blocks of it, and marks what is
chosen there. They tell each other their samples and counts, so that the choice is that of one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from dualsft.allocators.apportion import apportion
from dualsft.allocators.base import group_of
from dualsft.allocators.threshold import (
    BLOCK,
    Blocks,
    Counts,
    Threshold,
    bracket,
    count_ties,
    kth_largest,
    mark,
    sampling_stride,
)
from dualsft.errors import UserError
from dualsft.sharding.collectives import all_gather, all_reduce_max, all_reduce_sum
from dualsft.sharding.groups import RankGroup
from dualsft.sharding.shards import rows_of_rank

_SPARSE = 4
"""Ranks exchange the counts of all bins if a quarter of them may have entries, else of those that have some."""
By = Literal["magnitude", "signed"]
"""Rank by |φ|, or by φ itself."""


def check_by(allocator: str, by: str) -> None:
    """Refuse an unknown ranking."""
    if by not in get_args(By):
        raise UserError(f"{allocator} ranks by 'magnitude' or 'signed', not by {by!r}.")


def ranked(score: Float[Tensor, "..."], by: By) -> Float[Tensor, "..."]:
    """The values that rank the entries: |φ|, or φ itself (no copy)."""
    return score.abs() if by == "magnitude" else score


def own_part(entries: int, group: RankGroup) -> slice:
    """The part of a flat tensor that this rank of a group looks at: whole blocks, so that its bits are whole bytes."""
    blocks = rows_of_rank(-(-entries // BLOCK), group.rank, len(group))
    return slice(min(blocks.start * BLOCK, entries), min(blocks.stop * BLOCK, entries))


def largest_part(entries: int, ranks: int) -> int:
    """How many entries of a flat tensor the rank looks at that has most of them."""
    return min(entries, -(-entries // (ranks * BLOCK)) * BLOCK)


def empty_mask(shape: Sequence[int]) -> Bool[Tensor, "..."]:
    """A mask of which nothing is chosen; what is never written, as the parts of other ranks, takes no memory."""
    return torch.from_numpy(np.zeros(tuple(shape), np.bool_))  # torch's zeros take it at once


class Choice:
    """The entries chosen so far; ties go to the first name, then the first flat index.

    Args:
        scores: Parameter name -> φ_j, of the parameter's shape; ranked in float32. If they have a group of ranks, these
            choose together: each makes the same calls, and has a mask of its own parts alone.
        by: The ranking of entries.
        reverse: Whether the lowest are the best.
    """

    def __init__(self, scores: Mapping[str, Float[Tensor, "..."]], by: By, reverse: bool = False) -> None:
        self._scores, self._by, self._reverse = scores, by, reverse
        self._group = group_of(scores)
        shapes = {name: score.shape for name, score in scores.items()}
        self._mask = {name: empty_mask(shape) for name, shape in shapes.items()}
        self._taken = dict.fromkeys(scores, 0)
        self._buffer = np.empty(BLOCK, np.float32)

    @property
    def mask(self) -> dict[str, Bool[Tensor, "..."]]:
        """Parameter name -> which entries are chosen, for every name in the scores, where the scores are.

        Of ranks that choose together each has its own part of them.
        """
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
        within = bracket(np.concatenate(all_gather(self._sample(names), self._group)), k, free)
        threshold = kth_largest(lambda: self._blocks(names), k, within, self._add_up)
        left = threshold.ties
        ties = self._own_ties(names, threshold) if len(self._group) > 1 else {}
        for name in names:
            left -= self._mark(name, threshold, ties.get(name, left))
        taken = torch.tensor([self._taken[name] for name in names])
        self._taken.update(zip(names, all_reduce_sum(taken, self._group).tolist(), strict=True))

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
            part = self._part(name)
            values = self._values(self._scores[name].flatten()[part][::stride])
            sample.append(values[~self._flat(name)[part][::stride]] if self._taken[name] else values)
        return np.concatenate(sample)

    def _add_up(self, counts: Counts) -> Counts:
        """The counts of all ranks that choose together; each has those of its own parts."""
        if len(self._group) == 1:
            return counts
        if all_reduce_max(len(counts.bins), self._group) * len(self._group) < counts.size // _SPARSE:
            return Counts.merged(all_gather(counts, self._group))
        return Counts.of_dense(all_reduce_sum(torch.from_numpy(counts.dense()), self._group).numpy())

    def _own_ties(self, names: Sequence[str], threshold: Threshold) -> dict[str, int]:
        """How many of the entries at the threshold are to be chosen in this rank's part of each tensor."""
        if threshold.all_ties:
            return {}
        own = [sum(count_ties(*block, threshold) for block in self._blocks([name])) for name in names]
        at_threshold = np.array(all_gather(own, self._group)).T  # tensor after tensor, and in each rank after rank
        before = at_threshold.cumsum().reshape(at_threshold.shape) - at_threshold
        most = (threshold.ties - before).clip(0, at_threshold)[:, self._group.rank].tolist()
        return dict(zip(names, most, strict=True))

    def _blocks(self, names: Iterable[str]) -> Blocks:
        for name in names:
            mask = self._flat(name) if self._taken[name] else None
            for first, values in self._values_of(name):
                yield values, None if mask is None else mask[first : first + BLOCK]

    def _mark(self, name: str, threshold: Threshold, ties: int) -> int:
        """Choose a tensor's entries above the threshold, and the first of those at it; how many there are of these.

        What is taken of it is then that of this rank's part.
        """
        mask, before, taken = self._flat(name), ties, 0
        for first, values in self._values_of(name):
            chosen = mask[first : first + BLOCK]
            ties -= mark(chosen, values, threshold, ties)
            taken += int(np.count_nonzero(chosen))
        self._taken[name] = taken
        return before - ties

    def _part(self, name: str) -> slice:
        return own_part(self._mask[name].numel(), self._group)

    def _flat(self, name: str) -> Bool[np.ndarray, " entry"]:
        return self._mask[name].view(-1).numpy()

    def _values_of(self, name: str) -> Iterator[tuple[int, Float32[np.ndarray, " entry"]]]:
        """The place of the first entry of each own block of a tensor, and the block's values until the next is made."""
        score, own = self._scores[name].flatten(), self._part(name)
        for first in range(own.start, own.stop, BLOCK):
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
