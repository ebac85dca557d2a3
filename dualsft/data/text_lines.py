"""The lines of a text file, plain or compressed, with what keeps it from being read in one sentence."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from dualsft.errors import UserError

COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda file: io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), "zstd")),
}
"""Ending of a compressed file -> how it is opened."""
_POINTER = b"version https://git-lfs.github.com/spec/"


def text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line with its end), split at LF alone: U+2028 and the like occur inside records.

    Raises:
        UserError: If the file cannot be opened or decompressed, is not UTF-8, or stands for one that is elsewhere.
    """
    for number, raw in enumerate(_raw_lines(file), start=1):
        try:
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            where = f"{file.name}, line {number}, byte {error.start + 1} of the line"
            raise UserError(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8.") from error


def _raw_lines(file: Path) -> Iterator[bytes]:
    try:
        with _opened(file) as stream:
            for number, raw in enumerate(stream):
                if number == 0:
                    refuse_pointer(file, raw)
                yield raw
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{file} cannot be read ({reason}); give the whole file, and one that may be read.") from error


def _opened(file: Path) -> IO[bytes]:
    opened: IO[bytes] = COMPRESSED.get(file.suffix.lower(), lambda plain: plain.open("rb"))(file)
    return opened


def refuse_pointer(file: Path, start: bytes) -> None:
    """Refuses what git leaves in place of a large file that it did not fetch."""
    if start.startswith(_POINTER):
        raise UserError(f"{file} is a pointer of Git LFS, not the data: fetch them with `git lfs pull`.")
