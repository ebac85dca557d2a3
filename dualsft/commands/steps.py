"""Commands as the steps of one job: several at a time, each with its share of the processor's cores, behind one bar."""

import json
import shlex
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Self, TypeVar

import torch

from dualsft.errors import UserError
from dualsft.experiments.workers import Worker
from dualsft.runs.bars import open_bar
from dualsft.storage.writing import write_atomically

T = TypeVar("T")
_WORKER = "dualsft.commands.step_worker"
_AT_MOST = 0.95  # what counts of a step that takes longer than expected, until it is done


def log_file(step: Path) -> Path:
    """The file for what a step's command prints."""
    return step.with_suffix(".txt")


def error_file(step: Path) -> Path:
    """The file for the sentence that says why a step's command failed."""
    return step.with_suffix(".error")


class Steps:
    """Runs commands in worker processes; as a context, which ends these.

    Args:
        folder: Where each command is written to, ``NAME.json``, and what it prints, ``NAME.txt``.
        title: Of the bar.
        total: How long all steps take one after another, in seconds of any machine.
        parallel: How many run at a time, if there are as many cores.
    """

    def __init__(self, folder: Path, title: str, total: float, parallel: int) -> None:
        cores = torch.get_num_threads()
        count = min(parallel, cores)
        self._workers = [Worker(_WORKER, {"OMP_NUM_THREADS": str(cores // count)}) for _ in range(count)]
        self._free: SimpleQueue[Worker] = SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)
        folder.mkdir(exist_ok=True)
        self._folder, self._bar = folder, open_bar(title, total)
        self._under_way: dict[str, tuple[float, float]] = {}  # name -> when it began, and its share of the total
        self._done = self._seconds = 0.0
        self._stopped = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop()
        self._bar.close(finished=kind is None)

    def run(self, name: str, arguments: Sequence[object], expected: float) -> float:
        """Print a command and run it, once a worker is free; return the seconds that it took.

        Args:
            name: The step's, which is that of its files.
            arguments: The command's, without the program's name.
            expected: About how long it takes, in the seconds of the total.

        Raises:
            UserError: if the command fails.
        """
        worker = self._free.get()
        try:
            return self._run(worker, name, [str(argument) for argument in arguments], expected)
        finally:
            self._free.put(worker)

    def beside(self, first: Callable[[], T], *others: Callable[[], T]) -> list[T]:
        """Call functions that run steps beside each other; return what they return.

        Raises:
            Exception: what one of them raises, or an interruption; no step of the others is finished then.
        """
        with ThreadPoolExecutor(1 + len(others)) as threads:
            calls = [threads.submit(function) for function in (first, *others)]
            try:
                pending = set(calls)
                while pending:
                    finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                    for call in finished:
                        call.result()
                    self._show()
            except BaseException:
                self._stop()  # which lets the threads end, too
                raise
        return [call.result() for call in calls]

    def _run(self, worker: Worker, name: str, arguments: list[str], expected: float) -> float:
        if self._stopped:
            raise UserError(f"{name} was not begun, as another step has failed.")
        print(f"$ dualsft {shlex.join(arguments)}", flush=True)
        step = self._folder / f"{name}.json"
        write_atomically(step, json.dumps(arguments))
        start = time.perf_counter()
        self._under_way[name] = start, expected
        exit_code = worker.do(step)
        seconds = time.perf_counter() - start
        del self._under_way[name]
        self._done, self._seconds = self._done + expected, self._seconds + seconds
        if error_file(step).exists():
            raise UserError(error_file(step).read_text(encoding="utf-8"))
        if exit_code is not None:
            raise UserError(f"dualsft {arguments[0]} ended with exit code {exit_code}; see {log_file(step)}.")
        return seconds

    def _show(self) -> None:
        """Count what is done, and of what is under way as much as its time tells."""
        pace = self._done / self._seconds if self._done else 1.0
        now = time.perf_counter()
        begun = list(self._under_way.values())
        partly = sum(min(pace * (now - start), _AT_MOST * expected) for start, expected in begun)
        self._bar.set(max(self._bar.done, self._done + partly), self._bar.total)

    def _stop(self) -> None:
        self._stopped = True
        for worker in self._workers:
            worker.stop()
