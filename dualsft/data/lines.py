"""Very many lines of text: their bytes end to end, not an object each; from some size on in a file mapped into memory.

The file has no name: it is gone when its last user is, whatever ends that.
"""

import mmap
import tempfile
import weakref
from array import array
from typing import Any

import numpy as np
from jaxtyping import Int

from dualsft.data import cache_folder

_AT_ONCE = 2**20  # bytes that are written at once


class Lines:
    """Lines of text, each with a number.

    Args:
        raw: The bytes of all of them.
        ends: Where each ends, in bytes.
        numbers: The number of each.
    """

    def __init__(
        self, raw: bytearray | mmap.mmap, ends: Int[np.ndarray, " line"], numbers: Int[np.ndarray, " line"]
    ) -> None:
        self._raw, self._ends, self._numbers = raw, ends, numbers

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return len(self._raw)

    def text(self, row: int) -> str:
        """The text of a line."""
        row = range(len(self))[row]
        return self._raw[int(self._ends[row - 1]) if row else 0 : int(self._ends[row])].decode()

    def number(self, row: int) -> int:
        """The number of a line."""
        return int(self._numbers[row])


class LinesWriter:
    """Gathers lines.

    Args:
        cache_dir: The folder in which the file is made if there are many; None for the default's.

    Attributes:
        refusal: Why the lines are in memory, although there are many; None if they need not be, or are not.
    """

    def __init__(self, cache_dir: str | None) -> None:
        self._cache_dir = cache_dir
        self._ends, self._numbers = array("q"), array("q")
        self._held, self._written = bytearray(), 0  # bytes that are in memory, and how many are in the file before them
        self._file: Any = None
        self.refusal: OSError | None = None

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def size(self) -> int:
        """Bytes of the lines so far."""
        return self._written + len(self._held)

    def add(self, raw: bytes, number: int) -> None:
        """Add a line."""
        self._held += raw
        self._ends.append(self.size)
        self._numbers.append(number)
        if len(self._held) >= (_AT_ONCE if self._file else cache_folder.LARGE) and self.refusal is None:
            self._write()

    def lines(self) -> Lines:
        """All of them; nothing can be added afterwards."""
        if self._file is not None:
            self._write()
        raw = self._held if self._file is None else self._mapped()
        return Lines(raw, np.array(self._ends, np.int64), np.array(self._numbers, np.int64))

    def _write(self) -> None:
        """Move what is held into the file, or back from there if that fails."""
        try:
            if self._file is None:
                folder = cache_folder.cache_folder(self._cache_dir)
                folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed below)
                weakref.finalize(self, self._file.close)
            left = memoryview(bytes(self._held))  # of a copy: a view would keep what is held from growing
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.refusal = error
            if self._written:
                self._held = bytearray(self._mapped()) + self._held
            self._file, self._written = None, 0
        else:
            self._written, self._held = self.size, bytearray()

    def _mapped(self) -> mmap.mmap:
        """What is in the file, which stays as long as this does."""
        return mmap.mmap(self._file.fileno(), self._written, access=mmap.ACCESS_READ)
