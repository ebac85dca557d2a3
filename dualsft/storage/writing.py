"""Files that stand under their names only when they are whole and on the disk, and errors of writing as sentences."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dualsft.errors import UserError

_ADVICE = {
    errno.ENOENT: "its folder is gone: leave an output folder alone while a run is at work, and run again",
    errno.EACCES: "see that you may write there",
    errno.EROFS: "see that you may write there",
}
"""By the system's number of an error; for the others, room is what mostly lacks."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside a file's to write to; afterwards what is there is synced, and moved to its place in one step.

    After a failure the file is as it was, and nothing is left beside it.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        sync_to_disk(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file, completely or not at all; a `UserError` if it cannot be written."""
    with writing_to(path.parent), replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync_to_disk(path: Path) -> None:
    """Make the system write a file's contents to the disk now (fsync)."""
    with open(path, "r+b") as stream:  # Windows syncs only files that are open for writing
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make the system write the names in a folder to the disk now, so that a file that was moved there is found."""
    if os.name == "nt":  # which opens no folders
        return
    with suppress(OSError):  # a file system that syncs no folders
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def sync_tree(folder: Path) -> None:
    """Make the system write a folder's files to the disk now, those of its folders included."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync_to_disk(path)
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


@contextmanager
def writing_to(place: Path) -> Iterator[None]:
    """Turn the system's errors, as libraries raise them while they write, into a `UserError` that names the place."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or (reason := refusal(error)) is None:
            raise
        advice = next((_ADVICE[k] for k in _ADVICE if os.strerror(k) == reason), "see that it has room")
        raise UserError(f"{place} cannot be written ({reason}); {advice}.") from error


def refusal(error: BaseException) -> str | None:
    """The system's words in an error of writing, None for any other error.

    torch raises an error of its own while it handles the system's, and safetensors quotes the system's.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno)
        cause = cause.__cause__ or cause.__context__
    quoted = re.search(r"I/O error: (.*?)(?: \(os error \d+\))?$", str(error))
    return quoted[1] if quoted and type(error).__name__ == "SafetensorError" else None
