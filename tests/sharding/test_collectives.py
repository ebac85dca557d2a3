import pytest
import torch
from torch import distributed

from dualsft.errors import UserError
from dualsft.sharding.collectives import on_all_ranks, on_rank_zero
from dualsft.sharding.groups import rank, shard_mesh
from dualsft.sharding.last_words import has_anyone_spoken, is_first_to_say
from tests.world.ranks import run_on_ranks

pytestmark = pytest.mark.heavy


def _sum_of_ranks(offset: int) -> tuple[int, int]:
    value = torch.tensor(distributed.get_rank() + offset)
    distributed.all_reduce(value)
    return int(value), shard_mesh("cpu").size()


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


def _on_first(fails: bool) -> str:
    def act() -> str:
        if fails:
            raise OSError("the disk is full")
        return f"rank {rank()} did"

    try:
        return on_rank_zero(act)
    except (OSError, UserError) as error:
        return f"{type(error).__name__}: {error}"


def test_what_the_first_rank_does_all_know() -> None:
    """What it gives, or that it has failed; alone it is as if the action were called."""
    assert run_on_ranks(2, _on_first, False) == ["rank 0 did"] * 2
    assert run_on_ranks(2, _on_first, True) == ["OSError: the disk is full", "UserError: the disk is full"]
    assert _on_first(False) == "rank 0 did"
    with pytest.raises(ZeroDivisionError):
        on_rank_zero(lambda: 1 / 0)


def _on_all(failing: dict[int, str]) -> str:
    def act() -> str:
        if rank() in failing:
            raise UserError(failing[rank()])
        return f"rank {rank()} did"

    try:
        return on_all_ranks(act)
    except UserError as error:
        return f"refused{' elsewhere' if error.by_another_rank else ''}: {error}"


def test_what_fails_on_one_rank_fails_on_all() -> None:
    """In the words of the first that failed; what succeeds on all gives each its own result."""
    assert run_on_ranks(3, _on_all, {}) == ["rank 0 did", "rank 1 did", "rank 2 did"]
    assert run_on_ranks(3, _on_all, {1: "one", 2: "two"}) == [
        "refused elsewhere: one",
        "refused: one",
        "refused elsewhere: one",
    ]
    assert _on_all({}) == "rank 0 did"
    assert _on_all({0: "zero"}) == "refused: zero"


def _say(words: list[str]) -> tuple[bool, bool]:
    before = has_anyone_spoken()
    distributed.barrier()
    return before, is_first_to_say(words[rank()])


def test_ranks_say_a_thing_once() -> None:
    """One of those that would say the same does; alone, a process always says what it has to."""
    found = run_on_ranks(3, _say, ["same", "same", "other"])
    assert [before for before, _ in found] == [False] * 3
    assert sorted(first for _, first in found[:2]) == [False, True]
    assert found[2][1]
    assert [is_first_to_say("same"), is_first_to_say("same"), has_anyone_spoken()] == [True, True, False]
