"""The bytes that are held through a phase, counted tensor by tensor: a rank's shards, rounded up to whole rows."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dualsft.plans.shape import ModelShape, Weight

INDEX = 4
"""Bytes of the place of a chosen weight in its tensor (int32)."""
BLOCK_SHARES = 2
"""Blocks whose weights are gathered at a time: the one at work, and the next."""


@dataclass(frozen=True)
class Shards:
    """Counts bytes of things that have the shape of the weights, on the rank that holds most.

    Args:
        shape: The model.
        ranks: How many share its weights.
        sharded: Whether it is under FSDP2, as it may be on a single rank too.
    """

    shape: ModelShape
    ranks: int = 1
    sharded: bool = False

    def bytes_of(self, itemsize: Callable[[Weight], float]) -> int:
        """Of one entry for each weight of the shard, of this size."""
        return round(sum(weight.share(self.ranks) * itemsize(weight) for weight in self.shape.weights))

    @property
    def weights(self) -> int:
        """The weights themselves."""
        return self.bytes_of(lambda weight: weight.itemsize)

    @property
    def sums(self) -> int:
        """An accumulator of gradients, a direction, or anything else in float32 (float64 for float64 weights)."""
        return self.bytes_of(lambda weight: weight.wide)

    @property
    def widest(self) -> int:
        """The largest of these tensors in the type of sums."""
        return max(weight.share(self.ranks) * weight.wide for weight in self.shape.weights)

    def gathered(self, directions: int, gradients: bool) -> int:
        """What a sharded model takes beside its shards: the root unit's full tensors, and those of blocks at work.

        The root unit is all that is outside the blocks; its weights and directions stay for a whole backward pass.
        While a unit's gradients are summed over ranks they are there once more, in float32.
        """
        if not self.sharded:
            return 0
        own, wide = _by_unit(self.shape.weights, lambda w: w.itemsize), _by_unit(self.shape.weights, lambda w: w.wide)
        root, blocks = own.pop(None, 0), max(own.values(), default=0)
        root_wide, blocks_wide = wide.pop(None, 0), max(wide.values(), default=0)
        held = root + BLOCK_SHARES * blocks + directions * (root_wide + blocks_wide)
        return held + (max(root + root_wide, blocks + blocks_wide) if gradients else 0)


def _by_unit(weights: Iterable[Weight], itemsize: Callable[[Weight], int]) -> Counter[int | None]:
    found: Counter[int | None] = Counter()
    for weight in weights:
        found[weight.block] += weight.size * itemsize(weight)
    return found
