"""Bars that are drawn in a terminal, by rich."""

import sys
from typing import TYPE_CHECKING, Any

from dualsft.runs.bar import Bar, clock
from dualsft.runs.stream import is_terminal

if TYPE_CHECKING:
    from rich.progress import Progress

_FRAME = 0.1  # seconds between two drawings of a bar
_TITLE, _TIME, _NOTE, _OTHERS = (26, 44), 12, 20, 56  # characters: least and most of a title, and all but it


class TerminalBar(Bar):
    """A line of the terminal, drawn with those of other bars that are open."""

    _open: "list[TerminalBar]" = []  # noqa: RUF012 (of the terminal, of which there is one)
    _progress: "Progress | None" = None

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        if TerminalBar._progress is None:
            TerminalBar._progress = _new_progress()
            TerminalBar._progress.start()
        self._task = TerminalBar._progress.add_task(self.title, total=1.0, time="", note="")
        TerminalBar._open.append(self)
        self._show()

    def close(self, finished: bool) -> None:
        """Leave the bar where it is; one within another is wiped away."""
        assert TerminalBar._progress is not None
        if finished:
            self.done = self.total
        self._show()
        TerminalBar._open.remove(self)
        if TerminalBar._open:
            TerminalBar._progress.remove_task(self._task)
        else:
            TerminalBar._progress.stop()
            TerminalBar._progress = None

    def _wait(self) -> float:
        return _FRAME

    def _show(self) -> None:
        assert TerminalBar._progress is not None
        time_told = clock(self.elapsed) if self.left is None or self.share == 1 else f"{clock(self.left)} left"
        told: dict[str, Any] = {"time": time_told, "note": self.note}
        TerminalBar._progress.update(self._task, completed=self.share, **told)
        TerminalBar._progress.refresh()


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
