"""Runs sections one after the other in a process of their own, and starts another one where that fails to go on.

Libraries are loaded once for all sections. The process writes one line of JSON for each event on its standard output:
a section begins, a figure, a section ends. One that takes too long, or dies, takes the process with it; a new one goes
on with the next section.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, Queue
from threading import Thread
from typing import Any, TextIO

from gpu_checks import SECTIONS
from gpu_checks.results import Outcome, Results
from gpu_checks.section import MINIATURE, ON_GPU

Command = Callable[[Sequence[str]], list[str]]

_START = 120.0
"""Seconds that a process may take to load its libraries."""
_SPENT = "the budget of time was spent"


def work(names: Sequence[str], device: str) -> None:
    """Run these sections and tell of each figure; what else is printed goes to standard error."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    scale = ON_GPU if device == "cuda" else MINIATURE

    def tell(**event: Any) -> None:
        print(json.dumps(event), file=told, flush=True)

    for name in names:  # before any of them is timed; an error is told by its section
        with suppress(Exception):
            SECTIONS[name].load()
    for name in names:
        tell(event="begin", section=name)
        try:
            for figure in SECTIONS[name].load()(scale):
                tell(event="figure", section=name, **figure._asdict())
        except Exception as error:  # told, and the next section goes on
            lines = str(error).strip().splitlines()
            tell(event="end", section=name, reason=f"{type(error).__name__}: {lines[0] if lines else ''}")
        else:
            tell(event="end", section=name, reason="")


class Runner:
    """Runs sections within a budget of seconds and notes what comes of them.

    Args:
        results: Where it is noted.
        command: Names of sections -> the command that runs them and tells of each figure.
        limits: Name of a section -> the most seconds that it may take.
        seconds: The budget of all together.
    """

    def __init__(self, results: Results, command: Command, limits: dict[str, float], seconds: float) -> None:
        self._results, self._command, self._limits = results, command, limits
        self._end = time.monotonic() + seconds

    def run(self, names: Sequence[str]) -> None:
        """Run all, or as many as there is time for."""
        left = list(names)
        while left and time.monotonic() < self._end:
            done = self._in_one_process(left)
            left = left[max(done, 1) :]
        for name in left:
            self._finish(name, "skipped", _SPENT, 0.0)

    def _in_one_process(self, names: list[str]) -> int:
        """Run these until a section does not end by itself; how many are over."""
        process = subprocess.Popen(self._command(names), stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout is not None
        events: Queue[dict[str, Any] | None] = Queue()
        reader = Thread(target=_read, args=(process.stdout, events), daemon=True)
        reader.start()
        try:
            for done, name in enumerate(names):
                if done and time.monotonic() >= self._end:
                    return done
                if not self._follow(name, events, loading=done == 0):
                    return done + 1
            return len(names)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started
            process.wait()
            reader.join()
            process.stdout.close()

    def _follow(self, name: str, events: "Queue[dict[str, Any] | None]", loading: bool) -> bool:
        """Note a section's events; whether its process can go on."""
        start = time.monotonic()
        limit = min(start + (_START if loading else 0) + self._limits[name], self._end)
        while True:
            try:
                event = events.get(timeout=max(0.0, limit - time.monotonic()))
            except Empty:
                break
            if event is None:
                self._finish(name, "failed", "its process died", time.monotonic() - start)
                return False
            if event["event"] == "begin":
                start = time.monotonic()
                limit = min(start + self._limits[name], self._end)
            elif event["event"] == "figure":
                self._outcome(name).figures.append({key: event[key] for key in ("name", "value", "unit")})
                self._results.write()
            else:
                reason = event["reason"]
                self._finish(name, "failed" if reason else "done", reason, time.monotonic() - start)
                return True
        spent = time.monotonic() >= self._end
        why = _SPENT if spent else f"it took more than {self._limits[name]:g} s"
        self._finish(name, "stopped", why, time.monotonic() - start)
        return False

    def _outcome(self, name: str) -> Outcome:
        return self._results.sections[name]

    def _finish(self, name: str, outcome: str, reason: str, seconds: float) -> None:
        found = self._outcome(name)
        found.outcome, found.reason, found.seconds = outcome, reason, round(seconds, 2)
        self._results.write()
        told = f": {reason}" if reason else f", {len(found.figures)} figures"
        print(f"{name}: {outcome} in {seconds:.1f} s{told}", flush=True)


def _read(stream: TextIO, events: "Queue[dict[str, Any] | None]") -> None:
    for line in stream:
        events.put(json.loads(line))
    events.put(None)
