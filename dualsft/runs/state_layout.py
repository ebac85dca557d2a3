"""Whose states the files of a run are: which of them a rank writes, and which it is to delete."""

from dataclasses import replace

from dualsft.runs.state_file import StateName
from dualsft.sharding.groups import RankGroup, calls_alone, rank, replica, replicate_group, shard_group, world_size


class StateLayout:
    """How the states of some ranks lie in files: those of all ranks, of the ranks of one replica, or of one rank.

    Args:
        group: The ranks whose states they are, this one among them.

    Attributes:
        in_parts: Whether each rank of a replica saves a part of every state.
        of_some: Whether there are ranks that know nothing of these states.
        writes: Whether this rank saves its part; of a state of all, the first replica does for all.
        rank: This rank's number in the names of its files.
    """

    def __init__(self, group: RankGroup) -> None:
        self.in_parts = len(group) > 1 and not calls_alone()
        self.of_some = len(group) < world_size()
        self.writes = self.of_some or replica() == 0
        self.rank = shard_group().rank if self.in_parts else rank()

    def name(self, phase: str, version: int | None) -> StateName:
        """The name of this rank's file of a state."""
        if not self.in_parts:
            return StateName(phase, version, *((rank(), world_size()) if self.of_some else ()))
        of_replica = (replica(), len(replicate_group())) if self.of_some else ()
        return StateName(phase, version, self.rank, len(shard_group()), *of_replica)

    def has(self, name: StateName) -> bool:
        """Whether a file is of a state that these ranks save, this or another of them."""
        numbered = self.in_parts == (name.version is not None)
        return numbered and replace(self.name(name.phase, name.version), rank=name.rank) == name

    def deletes(self, name: StateName) -> bool:
        """Whether it is for this rank to delete a file: its own, and for rank zero all that are no other rank's."""
        if self.of_some or (self.in_parts and self.has(name)):
            return self.has(name) and name.rank == self.rank and self.writes
        return rank() == 0
