"""How far a phase is, and how long it still takes; how that is shown is for `dualsft.runs.bars`."""

import time
from abc import ABC, abstractmethod


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


def clock(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
