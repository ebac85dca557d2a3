"""Progress as people see it: a bar for each phase in a terminal, a line every so often in a log.

All commands draw their bars here, so that they look the same. A bar knows no unit: how far it is says how much of the
work is done, and the time left follows from that. Nothing is drawn but by `Bar.advance`, so that no thread runs beside
the work.
"""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dualsft.runs.stream import is_quiet, is_terminal

if TYPE_CHECKING:
    from rich.progress import Progress

_FRAME = 0.1  # seconds between two drawings of a bar
_FIRST_LINE, _LATER_LINES = (
    5.0,
    60.0,
)  # seconds to the first line in a log; the times to the next ones double up to this
_TITLE, _TIME, _NOTE, _OTHERS = (26, 44), 12, 20, 56  # characters: least and most of a title, and all but it


class Bar(ABC):
    """The progress of one phase.

    Args:
        title: The phase's name, with its number.
        total: The work of the phase, in any unit.
        done: How much of it an earlier run has done.
        seconds: How long that took.
    """

    def __init__(self, title: str, total: float, done: float = 0.0, seconds: float = 0.0) -> None:
        self.title, self.total, self.done = title, max(total, 1.0), done
        self._begun, self._before = time.monotonic(), done
        self._start, self._shown, self.note = self._begun - seconds, float("-inf"), ""

    def advance(self, work: float, note: str = "") -> None:
        """Count work as done, and show it, and a note such as the rate, if it is time to."""
        self.set(self.done + work, self.total, note)

    def set(self, done: float, total: float, note: str = "") -> None:
        """Set how much is done of how much; a phase that starts again goes back."""
        if done < self.done:
            self._begun, self._before = time.monotonic(), done
        self.done, self.total, self.note = done, max(total, 1.0), note
        if (now := time.monotonic()) - self._shown >= self._wait():
            self._shown = now
            self._show()

    @property
    def share(self) -> float:
        """How much of the work is done, from 0 to 1."""
        return min(self.done / self.total, 1.0)

    @property
    def elapsed(self) -> float:
        """Seconds that the phase has taken, in earlier runs too."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float | None:
        """Seconds that are left at the rate since this run, or this attempt, began; None before anything is done."""
        new = self.done - self._before
        return (time.monotonic() - self._begun) * (self.total - self.done) / new if new > 0 else None

    @abstractmethod
    def close(self, finished: bool) -> None:
        """Show the end of the phase."""

    @abstractmethod
    def _wait(self) -> float:
        """Seconds from one showing to the next."""

    @abstractmethod
    def _show(self) -> None:
        """Show the progress."""


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


class _Drawn(Bar):
    """A line of the terminal, drawn with those of other bars that are open."""

    _open: "list[_Drawn]" = []  # noqa: RUF012 (of the terminal, of which there is one)
    _progress: "Progress | None" = None

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        if _Drawn._progress is None:
            _Drawn._progress = _new_progress()
            _Drawn._progress.start()
        self._task = _Drawn._progress.add_task(self.title, total=1.0, time="", note="")
        _Drawn._open.append(self)
        self._show()

    def close(self, finished: bool) -> None:
        """Leave the bar where it is; one within another is wiped away."""
        assert _Drawn._progress is not None
        if finished:
            self.done = self.total
        self._show()
        _Drawn._open.remove(self)
        if _Drawn._open:
            _Drawn._progress.remove_task(self._task)
        else:
            _Drawn._progress.stop()
            _Drawn._progress = None

    def _wait(self) -> float:
        return _FRAME

    def _show(self) -> None:
        assert _Drawn._progress is not None
        time_told = clock(self.elapsed) if self.left is None or self.share == 1 else f"{clock(self.left)} left"
        told: dict[str, Any] = {"time": time_told, "note": self.note}
        _Drawn._progress.update(self._task, completed=self.share, **told)
        _Drawn._progress.refresh()


def _new_progress() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.table import Column

    class KeepsCursor(Console):
        def show_cursor(self, show: bool = True) -> bool:
            """Leave the cursor as it is: a run that is killed would not bring it back."""
            return False

    def text(field: str, width: int) -> TextColumn:
        column = Column(width=width, no_wrap=True, overflow="crop")  # an ellipsis is not in every encoding
        return TextColumn(f"{{task.{field}}}", markup=False, table_column=column)

    console, (least, most) = KeepsCursor(stderr=True), _TITLE
    return Progress(
        text("description", min(max(least, console.width - _OTHERS), most)),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        text("fields[time]", _TIME),
        text("fields[note]", _NOTE),
        console=console,
        auto_refresh=False,
        redirect_stdout=is_terminal(sys.stdout),  # what goes to a file stays out of the terminal
        expand=True,
    )


def open_bar(title: str, total: float, done: float = 0.0, seconds: float = 0.0, show: bool = True) -> Bar:
    """Begin to show a phase's progress on stderr, if that is wanted; its `Bar.close` ends it."""
    kind: Callable[..., Bar] = _Drawn if is_terminal(sys.stderr) else _Lines
    return (kind if show and not is_quiet() else _Hidden)(title, total, done, seconds)


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


def numbered(name: str, number: int, total: int | None) -> str:
    """A phase's name with its number, and how many there are if that is known."""
    return f"[{number}/{total}] {name}" if total and number <= total else f"[{number}] {name}"


def clock(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _write(line: str) -> None:
    print(f"dualsft: {line}", file=sys.stderr, flush=True)
