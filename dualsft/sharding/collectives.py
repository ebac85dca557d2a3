"""Collectives between the ranks of a job, or of a group of them; in a group of one each returns its own argument.

What is shared out among the shards of one copy of the model is added up, and agreed on, in their group alone
(`sum_of_shards`, `any_shard`); what each copy has found by itself is added up once (`add_up_replicas`).
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from dualsft.errors import UserError
from dualsft.sharding.groups import RankGroup, is_distributed, job_group, rank, replicate_group, shard_group

T = TypeVar("T")


def is_rank_zero() -> bool:
    """Whether this is the job's first process; before the process group exists, the launcher's variables decide."""
    if is_distributed():
        return rank() == 0
    if (variable := os.environ.get("RANK", os.environ.get("SLURM_PROCID"))) is not None:
        return variable == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("NODE_RANK", "LOCAL_RANK"))


def all_reduce_max(value: int, group: RankGroup | None = None) -> int:
    """The largest of the ranks' numbers."""
    if len(group := group or job_group()) == 1:
        return value
    tensor = torch.tensor(value)
    distributed.all_reduce(tensor, distributed.ReduceOp.MAX, group.handle)
    return int(tensor)


def any_rank(flag: bool, group: RankGroup | None = None) -> bool:
    """Whether the flag is set on any rank."""
    return bool(all_reduce_max(int(flag), group))


def all_reduce_sum(values: Tensor, group: RankGroup | None = None) -> Tensor:
    """The elementwise sum over the ranks."""
    if len(group := group or job_group()) > 1:
        values = values.clone()
        distributed.all_reduce(values, group=group.handle)
    return values


def any_shard(flag: bool) -> bool:
    """Whether the flag is set on any rank that calls the model together with this one: on this one, of replicas."""
    return any_rank(flag, shard_group())


def sum_of_shards(values: Tensor) -> Tensor:
    """The elementwise sum over the shards of one copy of the model; of a full one the values themselves."""
    return all_reduce_sum(values, shard_group())


def gather_shards(value: T) -> list[T]:
    """The values of all ranks that hold shards of one copy of the model; of a full one its own."""
    return all_gather(value, shard_group())


def add_up_replicas(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over the ranks that hold the same shard, or the full model, in place."""
    group = replicate_group()
    for tensor in tensors if len(group) > 1 else ():
        distributed.all_reduce(tensor, group=group.handle)


def all_gather(value: T, group: RankGroup | None = None) -> list[T]:
    """The values of all ranks, in the order of ranks."""
    if len(group := group or job_group()) == 1:
        return [value]
    values: list[T | None] = [None] * len(group)
    distributed.all_gather_object(values, value, group.handle)
    return values  # type: ignore[return-value]


def on_all_ranks(action: Callable[[], T], group: RankGroup | None = None) -> T:
    """Run an action on every rank and return this rank's result; if it fails on any rank, every rank raises.

    Raises:
        UserError: with the message of the first rank that failed, on every rank where the action did not fail with
            another exception.
    """
    if len(group := group or job_group()) == 1:
        return action()
    result: Any = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    messages = all_gather(None if failure is None else str(failure) or type(failure).__name__, group)
    if failure is not None and not isinstance(failure, UserError):
        raise failure
    for first, message in enumerate(messages):
        if message is not None:
            raise UserError(message, by_another_rank=first != group.rank) from failure
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


def barrier() -> None:
    """Wait until every rank has called this."""
    all_reduce_max(0)
