"""What the ranks of a job tell one another; a single process has nobody to ask, and every answer is its own."""

from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def rank() -> int:
    """Which of the job's processes this is."""
    return distributed.get_rank() if _several() else 0


def ranks() -> int:
    """How many processes the job has."""
    return distributed.get_world_size() if _several() else 1


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


def mine() -> slice:
    """Which of a list's entries are this rank's, if they are dealt out one by one."""
    return slice(rank(), None, ranks())


def barrier() -> None:
    """Wait until every rank has come here."""
    largest(0)


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
