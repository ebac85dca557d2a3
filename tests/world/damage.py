"""Ways in which a file is damaged, and a disk that takes no more."""

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[: len(whole) // 2],
    "cut at the end": lambda whole: whole[:-1],
    "zeros": lambda whole: bytes(len(whole)),
    "flipped": lambda whole: flipped(whole, len(whole) // 2),
}


def flipped(whole: bytes, place: int) -> bytes:
    """The bytes with one bit of one changed."""
    return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]


def damage_file(path: Path, how: str) -> None:
    """Damage a file in one of the ways; its times stay."""
    path.write_bytes(DAMAGE[how](path.read_bytes()))


def forget_checksums(folder: Path) -> None:
    """Leave a selection as an earlier version wrote it, without checksums, so that its files can be edited."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["checksums"]
    path.write_text(json.dumps(manifest), encoding="utf-8")


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """The system refuses to write more than so many bytes into a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
