"""The lock on an output folder: a file beside the state of the run, which comes and goes with it.

Only the process that holds the lock deletes the file, and while it holds it where the system allows that. So a process
that waits for a deleted file's lock never gets it (`filelock` looks at the file's number of names), and whoever has a
lock has that of the file at the path.
"""

import os
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

_TRIES = 100  # each fails only if another process has just deleted the lock and its folder


class FolderLock:
    """A lock of this process, however many runs it opens on the folder; the system lets it go when the process ends.

    Args:
        path: The lock's file; its folder is made if need be.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = FileLock(path, timeout=0, thread_local=False, is_singleton=True, fallback_to_soft=False)
        self._file: tuple[int, int] | None = None

    def acquire(self) -> bool:
        """Take the lock; False if another process has it.

        Raises:
            OSError: if the file cannot be made.
        """
        self._lock.release(force=True)  # an earlier run of this process may have failed and left it
        for attempt in range(1, _TRIES + 1):
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.touch()
                self._take()
                self._file = _identity(self._path)
                return True
            except Timeout:
                return False
            except (FileNotFoundError, FileExistsError):
                self._lock.release(force=True)
                if attempt == _TRIES:
                    raise
        raise AssertionError("unreachable")

    def _take(self) -> None:
        try:
            self._lock.acquire()
        except (Timeout, FileNotFoundError):
            raise
        except OSError:  # a file system without locks
            pass

    @property
    def is_taken(self) -> bool:
        """Whether this object has taken the lock and not let it go."""
        return self._file is not None

    def is_held(self) -> bool:
        """Whether the lock has been taken, and its file is still the one at the path."""
        with suppress(OSError):
            return self._file is not None and _identity(self._path) == self._file
        return False

    def release(self) -> None:
        """Let the lock go and leave its file, which other processes may take."""
        self._file = None
        self._lock.release(force=True)

    def remove(self) -> None:
        """Delete the file and, if nothing else is in it, its folder; and let the lock go."""
        with suppress(FileNotFoundError):
            try:
                self._path.unlink()
            except PermissionError:  # Windows deletes no open file, so not one that another process has taken since
                self.release()
                with suppress(PermissionError):
                    self._path.unlink()
        with suppress(OSError):
            self._path.parent.rmdir()
        self.release()


def _identity(path: Path) -> tuple[int, int]:
    about = os.stat(path)
    return about.st_dev, about.st_ino
