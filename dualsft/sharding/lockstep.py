"""Calls of a sharded model, which every rank makes at the same time.

A unit of a sharded model is whole only while all ranks take part in its forward or backward. Their work differs: they
have other batches, more or fewer of them, and what is not finite is looked at again. So each rank, before it calls the
model, says what kind of call it wants; the rarest kind that any rank wants is due, and the others stand in with a call
of that kind over an example of no weight. A rank without work stands in until all have finished.
"""

from collections.abc import Callable
from enum import IntEnum

from dualsft.sharding.collectives import all_reduce_max, world_size


class CallKind(IntEnum):
    """What a call is for; a larger one goes first."""

    NOTHING = 0
    STEP = 1
    """Forward and, if every rank's is sound, backward: gradients are added up."""
    PROBE = 2
    """Forward and backward of single examples: each rank looks at its own gradients, and none is added up."""
    EVALUATION = 3
    """Forward without gradients."""


def wait_for_turn(kind: CallKind, stand_in: Callable[[CallKind], None]) -> None:
    """Return when calls of this kind are due, on all ranks that have one to make.

    Args:
        kind: What the next call is for; ``NOTHING`` waits until no rank has a call left to make.
        stand_in: Makes a call of a kind over an example of no weight.
    """
    if world_size() == 1:
        return
    while (due := CallKind(all_reduce_max(kind))) != kind:
        stand_in(due)
