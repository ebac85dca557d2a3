"""Output that cannot be shown does not end the work."""

import os
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

import pytest
from tqdm import tqdm

from dualsft.cli import main, run
from dualsft.commands.terminal import calm_libraries, tolerant_output
from dualsft.runs.stream import QUIET, is_quiet


def closed_pipe() -> TextIO:
    """A pipe whose reader has left, as after ``| head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", encoding="utf-8")


def full_disk() -> TextIO:
    """A log on a full disk."""
    return open("/dev/full", "w", encoding="utf-8")


LINUX = pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has such a file")
STREAMS = [closed_pipe, pytest.param(full_disk, marks=LINUX)]


@pytest.mark.parametrize("make", STREAMS)
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_output_that_nobody_reads(name: str, make: Callable[[], TextIO], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed is lost, more than a buffer of it too, and the original stream comes back."""
    with make() as stream:
        monkeypatch.setattr(sys, name, stream)
        with tolerant_output():
            for _ in range(3):
                print("x" * 100_000, file=getattr(sys, name))
                getattr(sys, name).flush()
            for _ in tqdm(range(3), file=getattr(sys, name), mininterval=0):
                pass
            print("left in the buffer", file=getattr(sys, name))
        assert getattr(sys, name) is stream


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", "gr?n ? ? ?"), ("latin-1", "grün ? ? ?"), ("cp1252", "grün ? ? •"), ("utf-8", "grün → 数 •")],
)
def test_other_encodings(encoding: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the encoding lacks is replaced, by itself; half characters in names are too."""
    with open(tmp_path / "log", "w", encoding=encoding) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with tolerant_output():
            print("grün → 数 •")
            print("a\udcff")
    assert (tmp_path / "log").read_text(encoding=encoding) == f"{shown}\na?\n"


def test_a_stream_that_is_closed_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After ``>&-`` there is somewhere to write to."""
    monkeypatch.setattr(sys, "stdout", None)
    with tolerant_output():
        print("lost", file=sys.stdout)


@pytest.mark.parametrize(("arguments", "code"), [(["plugins"], 0), (["nonsense"], 1), (["select", "--nonsense"], 2)])
def test_the_exit_code_is_that_of_the_work(arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Success and mistakes end as they do on a terminal."""
    monkeypatch.setattr(sys, "argv", ["dualsft", *arguments])
    with closed_pipe() as out, closed_pipe() as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) if code else nullcontext() as stop:
            main()
    assert stop is None or stop.value.code == code


def test_no_command_shows_the_help_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that forgot its command is told on stderr, and does not go on as if all were well."""
    monkeypatch.setattr(sys, "argv", ["dualsft"])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("usage: dualsft COMMAND")


@pytest.mark.parametrize(("arguments", "told"), [(["help"], "COMMAND [options]"), (["help", "plugins"], "plugins\n")])
def test_help_is_a_command_too(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of dualsft, and of a command, as people type it who know git."""
    run(arguments)
    assert capsys.readouterr().out.startswith(f"usage: dualsft {told}")


@pytest.mark.parametrize("arguments", [["--debug", "nonsense"], ["nonsense", "--debug"]])
def test_the_whole_traceback_is_shown_where_it_is_asked_for(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the sentence, which stays the last line; the exit code stays too."""
    monkeypatch.setattr(sys, "argv", ["dualsft", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("dualsft: error: dualsft has no command 'nonsense'")


def test_libraries_show_no_bars_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their bars are off in logs and where --quiet is given, for the command's duration and in its processes."""
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with calm_libraries(quiet=True):
        assert os.environ["TQDM_DISABLE"] == os.environ[QUIET] == "1"
    assert "TQDM_DISABLE" not in os.environ
    assert not is_quiet()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with calm_libraries(quiet=False):
        assert "TQDM_DISABLE" not in os.environ
    monkeypatch.setenv("CI", "true")
    with calm_libraries(quiet=False):
        assert os.environ["TQDM_DISABLE"] == "1"


def test_warnings_are_one_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the place in a library that gives them; what will change for a library's callers is left out."""
    monkeypatch.setattr(sys, "warnoptions", [])
    before = warnings.formatwarning
    with calm_libraries(quiet=False):
        told = warnings.formatwarning("something\n  matters", UserWarning, "library.py", 7)
        warnings.warn("something will change", FutureWarning, stacklevel=1)  # which is an error otherwise
    assert told == "dualsft: warning: something matters\n"
    assert warnings.formatwarning is before
