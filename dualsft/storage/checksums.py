"""Checksums (CRC-32) of files, for damage on a disk: bytes are read once, in order, at about a gigabyte a second."""

import zlib
from pathlib import Path
from typing import BinaryIO

OTHER_BYTES = "it holds other bytes than were written"
_BLOCK = 2**20


def file_checksum(path: Path) -> str:
    """The checksum of a file's bytes, eight hexadecimal digits."""
    with open(path, "rb") as stream:
        return as_text(checksum_of_rest(stream))


def check_file(path: Path, recorded: str | None) -> None:
    """Raise a ValueError if a file's checksum is another than the recorded one; None, an earlier version's, is any."""
    if recorded is not None and file_checksum(path) != recorded:
        raise ValueError(OTHER_BYTES)


def checksum_of_rest(stream: BinaryIO, so_far: int = 0) -> int:
    """The checksum of what is left of a stream, continuing that of what comes before it."""
    while block := stream.read(_BLOCK):
        so_far = zlib.crc32(block, so_far)
    return so_far


def as_text(checksum: int) -> str:
    """A checksum as it is stored."""
    return f"{checksum:08x}"
