"""Bars in terminals, lines in logs."""

import io
import re
import sys
from typing import Any

import pytest

from dualsft.runs.bar import clock
from dualsft.runs.bars import bar, numbered, recorded
from dualsft.runs.progress import say
from dualsft.runs.stream import QUIET


class Clock:
    """A time that the test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock_set(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The bars' time."""
    found = Clock()
    monkeypatch.setattr("dualsft.runs.bar.time.monotonic", found)
    return found


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="backslashreplace")

    def isatty(self) -> bool:
        """It is one."""
        return True

    def shown(self) -> str:
        """What was written, without the codes of colours and of places."""
        self.flush()
        written = self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)


def in_terminal(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Terminal:
    """A terminal in the place of stderr, 100 columns wide."""
    for name, value in {"COLUMNS": "100", "TERM": "xterm", "CI": "", "NO_COLOR": "", QUIET: ""}.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal(**options)
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def test_a_log_gets_a_line_every_so_often(clock_set: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """After 5 seconds, then at growing distances up to a minute, without a carriage return; and one at the end."""
    with bar("[1/2] scores", 1000) as shown:
        for second in range(1, 301):
            clock_set.now = 1000 + second
            shown.advance(2, "7 tok/s")
    captured = capsys.readouterr().err
    assert "\r" not in captured
    assert captured.splitlines() == [
        "dualsft: [1/2] scores: 1%, 7 tok/s, 8:15 left",
        "dualsft: [1/2] scores: 3%, 7 tok/s, 8:05 left",
        "dualsft: [1/2] scores: 7%, 7 tok/s, 7:45 left",
        "dualsft: [1/2] scores: 15%, 7 tok/s, 7:05 left",
        *(f"dualsft: [1/2] scores: {share}%, 7 tok/s, {left} left" for share, left in ((27, "6:05"), (39, "5:05"))),
        "dualsft: [1/2] scores: 51%, 7 tok/s, 4:05 left",
        "dualsft: [1/2] scores: done in 5:00, 7 tok/s",
    ]


def test_the_time_left_rests_on_what_follows_the_first_batch(clock_set: Clock) -> None:
    """The first batch takes longer, as it is checked, and loads code; a phase that starts again forgets its rate."""
    with recorded() as bars, bar("scores", 100, show=False) as shown:
        clock_set.now += 30
        shown.advance(10)
        assert shown.left == pytest.approx(270)
        clock_set.now += 5
        shown.advance(10)
        assert (shown.rate, shown.left) == (pytest.approx(2), pytest.approx(40))
        shown.set(0, 100)
        assert shown.rate is None
    assert bars == [shown]


def test_a_short_phase_within_another_tells_nothing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    """Validations in a training would fill it; what fails tells no end."""
    with pytest.raises(ZeroDivisionError), bar("training", 10), bar("validation", 3):
        raise ZeroDivisionError
    with bar("training", 10), bar("validation", 3):
        pass
    assert capsys.readouterr().err == "dualsft: training: done in 0:00\n"


def test_a_terminal_has_a_bar_with_the_time_left(clock_set: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line: number, name, share, what is left at the rate of this run, and a note; messages stand above."""
    terminal = in_terminal(monkeypatch)
    with bar("[2/3] scores", 100, done=50, seconds=3000) as shown:
        clock_set.now += 10
        shown.advance(10, "7 tok/s")
        say("something happened.")
        clock_set.now += 40
        shown.advance(40, "8 tok/s")
    states = [state.rstrip() for state in re.split(r"[\r\n]+", terminal.shown()) if state.strip()]
    assert any(re.fullmatch(r"\[2/3\] scores +━+[╸╺]━+ +60% 0:40 left +7 tok/s", state) for state in states)
    assert "dualsft: something happened." in states
    assert re.fullmatch(r"\[2/3\] scores +━+ 100% 50:50 +8 tok/s", states[-1])


@pytest.mark.parametrize(("variables", "drawn"), [({"CI": "true"}, False), ({"TERM": "dumb"}, False), ({}, True)])
def test_bars_are_drawn_where_somebody_watches(
    variables: dict[str, str], drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal that belongs to CI, or that cannot move its cursor, gets lines."""
    terminal = in_terminal(monkeypatch)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with bar("scores", 1) as shown:
        shown.advance(1)
    assert ("━" in terminal.shown()) is drawn
    assert ("dualsft: scores: done" in terminal.shown()) is not drawn


def test_other_encodings_and_no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal without the bar's characters gets hyphens, and one that wants no colours none."""
    terminal = in_terminal(monkeypatch, encoding="ascii")
    monkeypatch.setenv("NO_COLOR", "1")
    with bar("a phase whose name is far too long for the column that the names have", 2) as shown:
        shown.advance(1)
    written = terminal.buffer.getvalue()  # type: ignore[attr-defined]
    assert b"-----" in written
    assert b"\\u" not in written
    assert not re.search(rb"\x1b\[[0-9;]*m", written)


@pytest.mark.parametrize("quiet", [True, False])
def test_nothing_is_shown_where_nothing_is_wanted(
    quiet: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the caller, or by --quiet."""
    if quiet:
        monkeypatch.setenv(QUIET, "1")
    with bar("scores", 1, show=quiet) as shown:
        shown.advance(1)
    assert capsys.readouterr().err == ""


def test_a_bar_leaves_stdout_and_the_cursor_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is printed to a file stays in the file, and whoever kills a run still sees the cursor."""
    terminal = in_terminal(monkeypatch)
    with bar("scores", 1):
        print("a result")
    assert capsys.readouterr().out == "a result\n"
    assert "a result" not in terminal.shown()
    assert b"\x1b[?25" not in terminal.buffer.getvalue()  # type: ignore[attr-defined]


def test_names_of_phases_and_times() -> None:
    """A phase beyond the planned ones has its number alone."""
    assert [numbered("a", 2, total) for total in (3, 2, 1, None)] == ["[2/3] a", "[2/2] a", "[2] a", "[2] a"]
    assert [clock(seconds) for seconds in (0.4, 59.6, 3599, 3600)] == ["0:00", "1:00", "59:59", "1:00:00"]
