"""What the ranks of a job tell one another; a single process has nobody to ask, and every answer is its own."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from dualsft.errors import UserError

T = TypeVar("T")


def rank() -> int:
    """Which of the job's processes this is."""
    return distributed.get_rank() if _is_distributed() else 0


def world_size() -> int:
    """How many processes the job has."""
    return distributed.get_world_size() if _is_distributed() else 1


def is_rank_zero() -> bool:
    """Whether this is the job's first process; before they have joined, as the launcher's environment tells."""
    if _is_distributed():
        return rank() == 0
    if (told := os.environ.get("RANK", os.environ.get("SLURM_PROCID"))) is not None:
        return told == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("NODE_RANK", "LOCAL_RANK"))


def all_reduce_max(value: int) -> int:
    """The largest of the ranks' numbers."""
    if not _is_distributed():
        return value
    shared = torch.tensor(value)
    distributed.all_reduce(shared, distributed.ReduceOp.MAX)
    return int(shared)


def any_rank(flag: bool) -> bool:
    """Whether it is so on any rank."""
    return bool(all_reduce_max(int(flag)))


def all_reduce_sum(values: Tensor) -> Tensor:
    """The ranks' numbers added up, entry by entry."""
    if _is_distributed():
        values = values.clone()
        distributed.all_reduce(values)
    return values


def all_gather(value: T) -> list[T]:
    """What each rank has, in their order."""
    if not _is_distributed():
        return [value]
    found: list[T | None] = [None] * world_size()
    distributed.all_gather_object(found, value)
    return found  # type: ignore[return-value]


def on_rank_zero(action: Callable[[], T]) -> T:
    """What an action gives on the first rank, which alone does it, told to all.

    Raises:
        UserError: on every rank, if the action fails.
    """
    if not _is_distributed():
        return action()
    told: list[Any] = [None, None]
    failure: Exception | None = None
    if rank() == 0:
        try:
            told[0] = action()
        except Exception as error:
            failure, told[1] = error, str(error) or type(error).__name__
    distributed.broadcast_object_list(told)
    if failure is not None:
        raise failure
    if told[1] is not None:
        raise UserError(told[1])
    result: T = told[0]
    return result


def rank_slice() -> slice:
    """Which of a list's entries are this rank's, if they are dealt out one by one."""
    return slice(rank(), None, world_size())


def barrier() -> None:
    """Wait until every rank has come here."""
    all_reduce_max(0)


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
