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
        self._begun = time.monotonic()
        self._marks = [(self._begun, done)]  # when this attempt began, and when its first work was done
        self._latest = self._marks[0]
        self._start, self._shown, self.note = self._begun - seconds, float("-inf"), ""

    def advance(self, work: float, note: str = "") -> None:
        """Count work as done, and show it, and a note such as the rate, if it is time to."""
        self.set(self.done + work, self.total, note)

    def set(self, done: float, total: float, note: str = "") -> None:
        """Set how much is done of how much; a phase that starts again goes back."""
        now = time.monotonic()
        if done < self.done:
            self._marks = [(now, done)]
        elif done > self.done and len(self._marks) == 1:
            self._marks.append((now, done))
        self._latest = now, done
        self.done, self.total, self.note = done, max(total, 1.0), note
        if now - self._shown >= self._wait():
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
    def span(self) -> tuple[float, float]:
        """When this run began the phase, and when its latest work was done, in seconds of the monotonic clock."""
        return self._begun, self._latest[0]

    @property
    def rate(self) -> float | None:
        """Work a second of this run, or this attempt, without its first batch, which takes longer, once there are more.

        None before anything is done.
        """
        for began, before in reversed(self._marks):
            latest, done = self._latest
            if done > before:
                return (done - before) / max(latest - began, 1e-9)
        return None

    @property
    def left(self) -> float | None:
        """Seconds that are left at this rate; None before anything is done."""
        return None if self.rate is None else (self.total - self.done) / self.rate

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
