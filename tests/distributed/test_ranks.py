import pytest
import torch
from torch import distributed

from tests.distributed.ranks import data_parallel_mesh, run_on_ranks


def _sum_of_ranks(offset: int) -> tuple[int, int]:
    value = torch.tensor(distributed.get_rank() + offset)
    distributed.all_reduce(value)
    return int(value), data_parallel_mesh()["data_parallel"].size()


def _fail_on_one() -> None:
    if distributed.get_rank() == 1:
        raise ValueError("not today")


def test_ranks_talk_to_each_other() -> None:
    """Each rank computes with the others, and its answer comes back."""
    assert run_on_ranks(2, _sum_of_ranks, 10) == [(21, 2), (21, 2)]


def test_a_failure_on_one_rank_is_told_with_its_traceback() -> None:
    """The others, which wait for it, are not waited for."""
    with pytest.raises(AssertionError, match=r"rank 1 failed:(.|\n)*ValueError: not today"):
        run_on_ranks(2, _fail_on_one)
