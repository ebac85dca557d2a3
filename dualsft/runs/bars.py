"""Progress as people see it: a bar for each phase in a terminal, a line every so often in a log.

All commands draw their bars here, so that they look the same. A bar knows no unit: how far it is says how much of the
work is done, and the time left follows from that. Nothing is drawn but by `Bar.advance`, so that no thread runs beside
the work.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from dualsft.runs.bar import Bar, clock
from dualsft.runs.stream import is_quiet, is_terminal
from dualsft.runs.terminal_bar import TerminalBar

# seconds to the first line in a log; the times to the next ones double, up to the second
_FIRST_LINE, _LATER_LINES = 5.0, 60.0
_RECORD: ContextVar[list[Bar] | None] = ContextVar("record", default=None)


def open_bar(title: str, total: float, done: float = 0.0, seconds: float = 0.0, show: bool = True) -> Bar:
    """Begin to show a phase's progress on stderr, if that is wanted; its `Bar.close` ends it."""
    kind: Callable[..., Bar] = TerminalBar if is_terminal(sys.stderr) else _Lines
    opened = (kind if show and not is_quiet() else _Hidden)(title, total, done, seconds)
    if (record := _RECORD.get()) is not None:
        record.append(opened)
    return opened


@contextmanager
def bar(title: str, total: float, done: float = 0.0, seconds: float = 0.0, show: bool = True) -> Iterator[Bar]:
    """Show a phase's progress for as long as the context is open; see `open_bar`."""
    opened = open_bar(title, total, done, seconds, show)
    try:
        yield opened
    except BaseException:
        opened.close(finished=False)
        raise
    opened.close(finished=True)


@contextmanager
def recorded() -> Iterator[list[Bar]]:
    """Gather the bars that are opened while this context is, hidden ones too: they tell how fast each phase was."""
    record: list[Bar] = []
    token = _RECORD.set(record)
    try:
        yield record
    finally:
        _RECORD.reset(token)


def numbered(name: str, number: int, total: int | None) -> str:
    """A phase's name with its number, and how many there are if that is known."""
    return f"[{number}/{total}] {name}" if total and number <= total else f"[{number}] {name}"


class _Hidden(Bar):
    def close(self, finished: bool) -> None:
        """Show nothing."""

    def _wait(self) -> float:
        return float("inf")

    def _show(self) -> None:
        """Show nothing."""


class _Lines(Bar):
    """Writes a line to stderr after 5 seconds, and then ever more seldom, up to once a minute."""

    _open = 0
    _next = _FIRST_LINE

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._shown, self._is_inner = self._begun, _Lines._open > 0
        _Lines._open += 1

    def close(self, finished: bool) -> None:
        """Tell that the phase is done, and how long it took; of one within another, only if that was long."""
        _Lines._open -= 1
        if finished and not (self._is_inner and self._next == _FIRST_LINE):
            _write(f"{self.title}: done in {clock(self.elapsed)}{self._told()}")

    def _wait(self) -> float:
        return self._next

    def _show(self) -> None:
        self._next = min(2 * self._next, _LATER_LINES)
        left = "" if self.left is None else f", {clock(self.left)} left"
        _write(f"{self.title}: {self.share:.0%}{self._told()}{left}")

    def _told(self) -> str:
        return f", {self.note}" if self.note else ""


def _write(line: str) -> None:
    print(f"dualsft: {line}", file=sys.stderr, flush=True)
