"""The bytes that are held through a phase, counted tensor by tensor: a rank's shards, rounded up to whole rows."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from dualsft.plans.shape import ModelShape, Weight

INDEX = 4
"""Bytes of the place of a chosen weight in its tensor (int32)."""
BLOCK_SHARES = 2
"""Blocks whose weights and directions are gathered at a time: the one at work, and the next."""


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
        """An accumulator of gradients, or anything else in float32 (float64 for float64 weights)."""
        return self.bytes_of(lambda weight: weight.wide)

    @property
    def directions(self) -> int:
        """A direction, in the type in which a pass holds it."""
        return self.bytes_of(lambda weight: weight.directed)

    @property
    def largest(self) -> int:
        """The largest of the weights, as of the gradients."""
        return max(weight.share(self.ranks) * weight.itemsize for weight in self.shape.weights)

    @property
    def widest(self) -> int:
        """The largest of these tensors in the type of sums."""
        return max(weight.share(self.ranks) * weight.wide for weight in self.shape.weights)

    def with_units(self, batch: int, directions: int, gradients: bool) -> int:
        """What a batch takes together with the units that a sharded model gathers.

        The root unit is all that is outside the blocks; its weights and directions stay for a whole backward pass. A
        unit's gradients are there a second time, in float32, while they are summed over ranks: those of a block while
        activations are alive, those of the root unit at the end.
        """
        if not self.sharded:
            return batch
        root, block = self._root_and_block(lambda weight: weight.itemsize)
        root_wide, block_wide = self._root_and_block(lambda weight: weight.wide)
        root_directed, block_directed = self._root_and_block(lambda weight: weight.directed)
        held = root + directions * root_directed
        at_work = batch + BLOCK_SHARES * (block + directions * block_directed)
        if not gradients:
            return held + at_work
        return held + max(at_work + block + block_wide, root + root_wide)

    def _root_and_block(self, itemsize: Callable[[Weight], int]) -> tuple[int, int]:
        """The bytes of the root unit, and of the largest block, with entries of this size."""
        found: Counter[int | None] = Counter()
        for weight in self.shape.weights:
            found[weight.block] += weight.size * itemsize(weight)
        root = found.pop(None, 0)
        return root, max(found.values(), default=0)
