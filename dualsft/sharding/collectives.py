"""Collectives between the ranks of a job; in a single process each returns its own argument.

The ranks of a job hold one model together, each a shard of it, or each holds a replica of its own. What is shared out
among shards is added up, and agreed on, only where there are shards (`sum_of_shards`, `any_shard`).
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from dualsft.errors import UserError

T = TypeVar("T")
_replicas = False  # like torch's default process group, a state of the process


def rank() -> int:
    """The number of this process in the job, from 0."""
    return distributed.get_rank() if is_distributed() else 0


def world_size() -> int:
    """The number of processes in the job."""
    return distributed.get_world_size() if is_distributed() else 1


def hold_replicas(replicas: bool) -> None:
    """Say, once the ranks have found each other, whether each is to hold the full model, and none a shard."""
    global _replicas
    _replicas = replicas


def has_replicas() -> bool:
    """Whether there are several ranks, of which each holds the full model."""
    return _replicas and is_distributed()


def calls_alone() -> bool:
    """Whether this process calls its model by itself, as one process and a replica do, and not in step with others."""
    return world_size() == 1 or has_replicas()


def is_rank_zero() -> bool:
    """Whether this is the job's first process; before the process group exists, the launcher's variables decide."""
    if is_distributed():
        return rank() == 0
    if (variable := os.environ.get("RANK", os.environ.get("SLURM_PROCID"))) is not None:
        return variable == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("NODE_RANK", "LOCAL_RANK"))


def all_reduce_max(value: int) -> int:
    """The largest of the ranks' numbers."""
    if not is_distributed():
        return value
    tensor = torch.tensor(value)
    distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return int(tensor)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return bool(all_reduce_max(int(flag)))


def all_reduce_sum(values: Tensor) -> Tensor:
    """The elementwise sum over the ranks."""
    if is_distributed():
        values = values.clone()
        distributed.all_reduce(values)
    return values


def any_shard(flag: bool) -> bool:
    """Whether the flag is set on any rank that calls the model together with this one: on this one, of replicas."""
    return flag if has_replicas() else any_rank(flag)


def sum_of_shards(values: Tensor) -> Tensor:
    """The elementwise sum over the ranks' shards of one model; of a replica the values themselves."""
    return values if has_replicas() else all_reduce_sum(values)


def gather_shards(value: T) -> list[T]:
    """The values of all ranks that hold shards of one model; of a replica its own."""
    return [value] if has_replicas() else all_gather(value)


def add_up_replicas(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over the replicas, in place; nothing where there are none."""
    for tensor in tensors if has_replicas() else ():
        distributed.all_reduce(tensor)


def all_gather(value: T) -> list[T]:
    """The values of all ranks, in the order of ranks."""
    if not is_distributed():
        return [value]
    values: list[T | None] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def on_all_ranks(action: Callable[[], T]) -> T:
    """Run an action on every rank and return this rank's result; if it fails on any rank, every rank raises.

    Raises:
        UserError: with the message of the first rank that failed, on every rank where the action did not fail with
            another exception.
    """
    if not is_distributed():
        return action()
    result: Any = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    messages = all_gather(None if failure is None else str(failure) or type(failure).__name__)
    if failure is not None and not isinstance(failure, UserError):
        raise failure
    for first, message in enumerate(messages):
        if message is not None:
            raise UserError(message, by_another_rank=first != rank()) from failure
    return result


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run an action on rank zero alone and return its result on every rank.

    Raises:
        UserError: on every other rank, if the action fails; rank zero raises the exception itself.
    """
    result = [on_all_ranks(lambda: action() if rank() == 0 else None)]
    if is_distributed():
        distributed.broadcast_object_list(result)
    return result[0]  # type: ignore[return-value]


def rank_slice() -> slice:
    """The slice of a list that takes this rank's entries: one in `world_size`, from `rank` on.

    Of things that are sorted by size each rank then takes about as much.
    """
    return slice(rank(), None, world_size())


def barrier() -> None:
    """Wait until every rank has called this."""
    all_reduce_max(0)


def is_distributed() -> bool:
    """Whether this process is one of several ranks that have found each other."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
