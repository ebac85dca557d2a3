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
    return distributed.get_rank() if _several() else 0


def ranks() -> int:
    """How many processes the job has."""
    return distributed.get_world_size() if _several() else 1


def leads() -> bool:
    """Whether this is the job's first process; before they have joined, as the launcher's environment tells."""
    if _several():
        return rank() == 0
    if (told := os.environ.get("RANK", os.environ.get("SLURM_PROCID"))) is not None:
        return told == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("NODE_RANK", "LOCAL_RANK"))


def largest(value: int) -> int:
    """The largest of the ranks' numbers."""
    if not _several():
        return value
    shared = torch.tensor(value)
    distributed.all_reduce(shared, distributed.ReduceOp.MAX)
    return int(shared)


def any_of(flag: bool) -> bool:
    """Whether it is so on any rank."""
    return bool(largest(int(flag)))


def total(values: Tensor) -> Tensor:
    """The ranks' numbers added up, entry by entry."""
    if _several():
        values = values.clone()
        distributed.all_reduce(values)
    return values


def gathered(value: T) -> list[T]:
    """What each rank has, in their order."""
    if not _several():
        return [value]
    found: list[T | None] = [None] * ranks()
    distributed.all_gather_object(found, value)
    return found  # type: ignore[return-value]


def first(action: Callable[[], T]) -> T:
    """What an action gives on the first rank, which alone does it, told to all.

    Raises:
        UserError: on every rank, if the action fails.
    """
    if not _several():
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


def mine() -> slice:
    """Which of a list's entries are this rank's, if they are dealt out one by one."""
    return slice(rank(), None, ranks())


def barrier() -> None:
    """Wait until every rank has come here."""
    largest(0)


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
