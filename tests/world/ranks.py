"""Functions run on several processes that talk to each other, as ranks of a job do; as torchrun starts them."""

import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import distributed

from tests.world.forks import FORKS

_SECONDS = 300


def run_on_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What a function of a module's top level gives on each rank of a gloo group, given these arguments.

    Raises:
        AssertionError: with its traceback, if it fails on a rank, or if one has not answered after five minutes.
    """
    port = free_port()
    ends, ranks = [], []
    for rank in range(count):
        ours, theirs = FORKS.Pipe()
        process = FORKS.Process(target=_rank, args=(rank, count, port, theirs, function, args), daemon=True)
        process.start()
        theirs.close()
        ends.append(ours)
        ranks.append(process)
    try:
        return _answers(ends)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _answers(ends: list[Connection]) -> list[Any]:
    answers: dict[int, Any] = {}
    while len(answers) < len(ends):
        open_ends = [end for k, end in enumerate(ends) if k not in answers]
        ready = wait(open_ends, timeout=_SECONDS)
        assert ready, f"ranks {sorted(set(range(len(ends))) - set(answers))} do not answer"
        for end in ready:
            assert isinstance(end, Connection)
            rank = ends.index(end)
            try:
                failure, answers[rank] = pickle.loads(end.recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            assert not failure, f"rank {rank} failed:\n{failure}"
    return [answers[rank] for rank in range(len(ends))]


def _rank(
    rank: int, count: int, port: int, end: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        distributed.init_process_group("gloo")
        answer = "", function(*args)
        distributed.barrier()
    except BaseException:
        answer = traceback.format_exc(), None
    end.send_bytes(pickle.dumps(answer))  # whole: what send() does with tensors outlives no process
    end.close()


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
