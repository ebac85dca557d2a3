"""A choice of entries built up in steps: the best of some tensors, then the best of others, until the budget is used.

Besides the scores it holds one mask; everything else is computed for one tensor at a time.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dualsft.allocators.apportion import apportion
from dualsft.allocators.ranking import By, kth_largest, ordered_keys, ranked

_LAST = torch.iinfo(torch.int32).min  # below the key of every float


class Choice:
    """The entries chosen so far; ties go to the first name, then the first flat index.

    Args:
        scores: Parameter name -> φ_j, of the parameter's shape.
        by: What entries are ranked by.
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
        """How many entries of these tensors are not chosen."""
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
        """Split a budget over groups of tensors in proportion to their shares, and take the best within each.

        Args:
            groups: Names of tensors; a tensor is in one group at most.
            shares: Finite and not negative. A group that is too small is filled, and leaves the rest to the others.
            budget: How many to choose.

        Returns:
            How many were chosen: fewer than the budget if the groups have no more that are not chosen yet.
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
