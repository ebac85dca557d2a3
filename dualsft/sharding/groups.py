"""The groups that the ranks of a job form: those that hold one copy of the model, and those that hold the same shard.

With a shard size S, the ranks rS … rS + S − 1 are the r-th *shard group*, which holds one copy of the model, a replica.
The s-th ranks of all shard groups are the s-th *replicate group*: each holds the same rows. With 8 ranks and S = 4

    shard groups  {0 1 2 3} {4 5 6 7}        replicate groups  {0 4} {1 5} {2 6} {3 7}

S is the number of ranks where the job holds one copy, and 1 where every rank holds the full model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

from torch import distributed
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

REPLICAS_WAIT = timedelta(days=1)
"""How long replicas wait for each other: they meet when the slowest has finished its pass."""


@dataclass(frozen=True)
class RankGroup:
    """Some ranks of the job, this one among them.

    Attributes:
        ranks: Their numbers in the job, ascending.
        handle: torch's group; None for that of the whole job, and for a single rank, which talks to nobody.
    """

    ranks: range
    handle: ProcessGroup | None = None

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def rank(self) -> int:
        """This rank's number in the group, from 0."""
        return self.ranks.index(rank())


def is_distributed() -> bool:
    """Whether this process is one of several ranks that have found each other."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def rank() -> int:
    """The number of this process in the job, from 0."""
    return distributed.get_rank() if is_distributed() else 0


def world_size() -> int:
    """The number of processes in the job."""
    return distributed.get_world_size() if is_distributed() else 1


def job_group() -> RankGroup:
    """All ranks."""
    return RankGroup(range(world_size()))


def own_group() -> RankGroup:
    """This rank alone."""
    return RankGroup(range(rank(), rank() + 1))


def shard_group() -> RankGroup:
    """The ranks that hold this rank's copy of the model; all, unless groups were formed."""
    return _formed[0] if _formed and is_distributed() else job_group()


def replicate_group() -> RankGroup:
    """The ranks that hold the same shard as this one; this one alone, unless groups were formed."""
    return _formed[1] if _formed and is_distributed() else own_group()


def shard_mesh(device_type: str) -> DeviceMesh:
    """The mesh of the ranks that hold this rank's copy of the model, along one axis.

    It is made of the group that they have: torch would split it off the job's group if a device is bound to that, which
    fails for a group of two backends in some releases.
    """
    group = shard_group().handle or distributed.group.WORLD
    assert group is not None
    assert group.size() == len(shard_group())
    return DeviceMesh.from_group(group, device_type, mesh_dim_names=("shard",))


def replica() -> int:
    """The number of this rank's shard group, from 0."""
    return replicate_group().rank


def calls_alone() -> bool:
    """Whether this process calls its model by itself, as one process and a replica do, and not in step with others."""
    return len(shard_group()) == 1


def has_full_replicas() -> bool:
    """Whether there are several ranks, of which each holds the full model."""
    return calls_alone() and is_distributed()


def rank_slice() -> slice:
    """The slice of a list that takes this rank's entries: one in `world_size`, from `rank` on.

    Of things that are sorted by size each rank then takes about as much.
    """
    return slice(rank(), None, world_size())


_formed: tuple[RankGroup, RankGroup] | None = None  # like torch's default process group, a state of the process


def form_groups(shard_size: int, timeout: timedelta | None = None) -> None:
    """Say, once the ranks have found each other, how many of them hold one copy of the model; all ranks call this.

    Args:
        shard_size: S, which divides the number of ranks.
        timeout: How long a rank waits for others of its shard group; torch's default if None.
    """
    global _formed
    size = world_size()
    shard_groups = [range(first, first + shard_size) for first in range(0, size, shard_size)]
    replicate_groups = [range(first, size, shard_size) for first in range(shard_size)]
    _formed = _own_of(shard_groups, timeout), _own_of(replicate_groups, REPLICAS_WAIT)


def _own_of(groups: Iterable[range], timeout: timedelta | None) -> RankGroup:
    """This rank's group; every rank makes all of them, in the same order."""
    own = own_group()
    for ranks in groups:
        handle = distributed.new_group([*ranks], timeout=timeout) if 1 < len(ranks) < world_size() else None
        if rank() in ranks:
            own = RankGroup(ranks, handle)
    return own
