"""The standard streams of the console script: what is shown may fail, and the work does not depend on it.

A character that the terminal's encoding lacks is replaced. A reader that has left (``| head -1``), a terminal that is
gone and a log on a full disk lose what is printed from then on, and nothing else.
"""

import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dualsft.runs.stream import QUIET, is_terminal


class _Tolerant(io.FileIO):
    """A file descriptor that takes everything, and loses what cannot be written."""

    def write(self, data: Any) -> int:
        """Write to the file; what fails counts as written."""
        try:
            written = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written


@contextmanager
def calm_libraries(quiet: bool) -> Iterator[None]:
    """Set for a while what keeps progress bars, ours and those of libraries, out of logs and of quiet terminals.

    It is set in the environment, which processes of the job inherit, and before the libraries are imported.
    """
    own = {QUIET: "1"} if quiet else {}
    if quiet or not is_terminal(sys.stderr):
        own["TQDM_DISABLE"] = "1"
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        with _plain_warnings():
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show a warning as one line without its source, and none about what will change for whoever calls a library.

    Whoever asks Python for other warnings (``-W``) gets these.
    """
    with warnings.catch_warnings():
        if not sys.warnoptions:
            for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", kind)
        usual, warnings.formatwarning = warnings.formatwarning, one_line
        try:
            yield
        finally:
            warnings.formatwarning = usual


def one_line(message: Warning | str, *place: Any, **line: Any) -> str:
    """A warning as it is shown, in the place of `warnings.formatwarning`."""
    return f"dualsft: warning: {' '.join(str(message).split())}\n"


@contextmanager
def tolerant_output() -> Iterator[None]:
    """Replace stdout and stderr for a while by streams to the same places whose failures do not end the program."""
    before = sys.stdout, sys.stderr
    ours = _tolerant(sys.stdout, "replace"), _tolerant(sys.stderr, "backslashreplace")
    sys.stdout, sys.stderr = ours
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in set(ours) - set(before):
            stream.close()


def _tolerant(stream: Any, errors: str) -> Any:
    if stream is None:  # closed by the caller: an artifact's file must not get its number, which C libraries write to
        return open(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    try:
        raw = _Tolerant(stream.fileno(), "wb", closefd=False)
    except (OSError, ValueError):  # no file, as under a test runner
        return stream
    buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        encoding=stream.encoding,
        errors=errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
