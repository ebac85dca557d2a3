"""Lockstep: all ranks of a copy call a sharded model at the same time, with the same kind of call.

A unit of a sharded model is gathered only while all ranks take part in its forward or backward. The ranks' work
differs: they have other batches, more or fewer of them, and re-examine batches that are not finite. So before each call
of the model every rank states what kind of call it wants. The largest kind that any rank wants is made next, and ranks
that want another make a dummy call of that kind, over an example of weight zero. A rank that has run out of work makes
dummy calls until all ranks have. Replicas never wait for each other.
"""

from collections.abc import Callable
from enum import IntEnum

from dualsft.sharding.collectives import all_reduce_max
from dualsft.sharding.groups import calls_alone, shard_group


class CallKind(IntEnum):
    """What a call is for; a larger kind takes precedence."""

    NOTHING = 0
    STEP = 1
    """Forward and, if it is finite on every rank, backward; gradients are added over the ranks."""
    PROBE = 2
    """Forward and backward of single examples: each rank inspects its own gradients, and none are added."""
    EVALUATION = 3
    """Forward without gradients."""


def wait_for_turn(kind: CallKind, dummy_call: Callable[[CallKind], None]) -> None:
    """Make dummy calls, over an example of weight zero, until the next call on all ranks is of this kind.

    ``NOTHING`` waits until no rank has a call left to make.
    """
    if calls_alone():
        return
    while (next_kind := CallKind(all_reduce_max(kind, shard_group()))) != kind:  # another rank wants a larger kind
        dummy_call(next_kind)
