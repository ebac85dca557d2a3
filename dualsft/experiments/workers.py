"""Worker processes: each does one job after another on a device of its own, and a job that kills its worker is told.

A worker is a Python process that reads the folders of jobs from its standard input, one a line, and answers each with a
line once the job is done. What it does is said by the module that it runs.
"""

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

Done = Callable[[Path, int | None], None]
"""Called with a job's folder once it is done; with the exit code of its worker if that died at it."""
_DONE = "done\n"


class Worker:
    """One process that does jobs, started when the first one comes and again after it died.

    Args:
        module: What ``python -m`` runs in it: it calls `serve`.
        environment: Variables that it has beside those of this process.
    """

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        self._command = [sys.executable, "-m", module]
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def do(self, place: Path) -> int | None:
        """Do the job in a folder; return None once it is done, or the exit code of the process if that died at it."""
        if (process := self._started()) is None:
            return None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(f"{place}\n")
            process.stdin.flush()
            if _DONE in process.stdout:  # reads on, over what anything printed while it was imported
                return None
        except BrokenPipeError:
            pass
        with self._lock:
            self._process = None
        return _ended(process)

    def stop(self) -> None:
        """End the process at once, and start none any more."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()
                _ended(self._process)

    def _started(self) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._process is None and not self._stopped:
                self._process = subprocess.Popen(
                    self._command, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            return None if self._stopped else self._process


def _ended(process: "subprocess.Popen[str]") -> int:
    """Wait for a process to end, close its pipes, and return its exit code."""
    with suppress(BrokenPipeError), process:
        pass
    return process.wait()


def do_all(
    places: Sequence[Path],
    workers: Sequence[Worker],
    done: Done,
    waiting: Callable[[], None] = lambda: None,
    taken: Callable[[Path], bool] = lambda _: False,
) -> None:
    """Do the jobs in these folders, each by the next worker that is free; an interruption stops the workers.

    While it waits it calls ``waiting`` every second. A job that is ``taken`` by another process is put off as long as
    there are others, so that several commands share the work on one bank.
    """
    if not places:
        return
    free: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        free.put(worker)
    left, choosing = list(places), threading.Lock()

    def do_one() -> tuple[Path, int | None]:
        worker = free.get()
        with choosing:
            place = next((place for place in left if not taken(place)), left[0])
            left.remove(place)
        try:
            return place, worker.do(place)
        finally:
            free.put(worker)

    with ThreadPoolExecutor(len(workers)) as threads:
        try:
            pending = {threads.submit(do_one) for _ in places}
            while pending:
                finished, pending = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
                for job in finished:
                    done(*job.result())
                waiting()
        except BaseException:
            for worker in workers:
                worker.stop()  # which lets the threads end, too
            raise


def serve(do: Callable[[Path], None], log: Callable[[Path], Path]) -> None:
    """Do the jobs that come in, as a worker; what they print goes to each one's log.

    The worker ends, in the middle of a job if need be, as soon as the process that started it has ended.

    Args:
        do: Does the job in a folder.
        log: The file for what the job in a folder prints.
    """
    answers = os.fdopen(os.dup(1), "w")  # descriptor 1 will be the job's log
    asked: SimpleQueue[Path] = SimpleQueue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()
    gc.freeze()  # what is imported stays: no collection after a job need look at it again
    while True:
        place = asked.get()
        with open(log(place), "a", encoding="utf-8") as output:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            do(place)
            sys.stdout.flush()
            sys.stderr.flush()
        answers.write(f"\n{_DONE}")  # a line of its own, whatever was printed before
        answers.flush()


def _listen(asked: SimpleQueue[Path]) -> None:
    """Pass on the folders that are asked for; end the process when nobody can ask any more."""
    for line in sys.stdin:
        asked.put(Path(line.rstrip("\n")))
    os._exit(0)
