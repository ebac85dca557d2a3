"""How much lies in a folder while something is written there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder; one with several names counts once, and one that is deleted while it is open.

    The latter of this process alone, and where the system tells (Linux).
    """
    sizes = {}
    for opened in Path("/proc/self/fd").glob("*"):
        with suppress(OSError):
            if (name := os.readlink(opened)).startswith(f"{folder}/") and name.endswith(" (deleted)"):
                about = opened.stat()
                sizes[about.st_ino] = about.st_size
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another rank may delete it at any moment
            if path.is_file():
                about = path.stat()
                sizes[about.st_ino] = about.st_size
    return sum(sizes.values())


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """The bytes in a folder each time that a file in it is complete, which is when the system is asked to sync it.

    What a file replaces is still there then.
    """
    sizes: list[int] = []

    def look(_: int) -> None:
        sizes.append(size_of(folder))

    with mock.patch.object(os, "fsync", look):
        yield sizes
