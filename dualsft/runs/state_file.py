"""A file of a phase's state: named tensors, notes, and a checksum of both.

Its name says whose state it is:

    PHASE.safetensors                               one process's, or that of all replicas
    PHASE@V.rank-R-of-N.safetensors                 a part, of one of N ranks with shards; V counts a phase's states
    PHASE.replica-K-of-M@V.rank-R-of-N.safetensors  the same of one of M copies, each in shards, by itself
    PHASE.rank-R-of-N.safetensors                   one rank's by itself
"""

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dualsft.errors import UserError, first_line
from dualsft.models.tensor_file import OpenTensors
from dualsft.storage.writing import refusal, replacing

_NOTES, _CHECKSUM = "notes", "crc32"
_NAME = re.compile(
    r"(?P<phase>.+?)(\.replica-(?P<replica>\d+)-of-(?P<replicas>\d+))?(@(?P<version>\d+))?"
    r"(\.rank-(?P<rank>\d+)-of-(?P<ranks>\d+))?\.safetensors"
)
_NUMBERS = ("version", "rank", "ranks", "replica", "replicas")


@dataclass(frozen=True)
class StateName:
    """What the name of a file says.

    Attributes:
        phase: The phase whose state it is.
        version: The number of the state that it is a part of; None if it is no part.
        rank: The rank that has saved it; None if it is common to all.
        ranks: How many there were; None likewise.
        replica: The copy of the model whose state it is; None if it is not that of one in shards.
        replicas: How many there were; None likewise.
    """

    phase: str
    version: int | None = None
    rank: int | None = None
    ranks: int | None = None
    replica: int | None = None
    replicas: int | None = None

    @classmethod
    def of(cls, path: Path) -> "StateName | None":
        """That of a file; None if it is no state."""
        if (found := _NAME.fullmatch(path.name)) is None:
            return None
        numbers = (found[part] for part in _NUMBERS)
        return cls(found["phase"], *(None if number is None else int(number) for number in numbers))

    def __str__(self) -> str:
        version = "" if self.version is None else f"@{self.version}"
        rank = "" if self.rank is None else f".rank-{self.rank}-of-{self.ranks}"
        replica = "" if self.replica is None else f".replica-{self.replica}-of-{self.replicas}"
        return f"{self.phase}{replica}{version}{rank}.safetensors"


def state_files(folder: Path) -> Iterator[tuple[Path, StateName]]:
    """The files of states in a folder."""
    for path in folder.glob("*.safetensors"):
        if (name := StateName.of(path)) is not None:
            yield path, name


def write_state(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Write a file of contiguous tensors on the host, completely or not at all.

    Raises:
        UserError: if it cannot be written.
    """
    text = json.dumps(notes)
    try:
        with replacing(path) as partial:
            save_file(dict(tensors), partial, {_NOTES: text, _CHECKSUM: _checksum(tensors, text)})
    except Exception as error:
        if (reason := refusal(error)) is None:
            raise
        raise UserError(
            f"The state of the run cannot be kept in {path.parent} ({reason}); see that it can be written and has "
            "room, and go on with --resume."
        ) from error


def notes_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The notes among the strings of a file."""
    notes: dict[str, Any] = json.loads(metadata[_NOTES])
    return notes


def damage_of(path: Path) -> str | None:
    """What is wrong with a file, in a sentence; None if it is as it was written."""
    try:
        stored = OpenTensors(path)
        if not isinstance(notes_of(stored.metadata), dict):
            return f"{path} is damaged (it has no notes)"
    except Exception as error:  # damaged bytes may raise anything
        return f"{path} is damaged ({first_line(error)})"
    checksum = stored.metadata.get(_CHECKSUM)
    if checksum not in (None, _checksum(stored, stored.metadata[_NOTES])):  # None: an earlier version's
        return f"{path} is damaged (it holds other bytes than were written)"
    return None


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """CRC-32 over notes and tensors: for damage on a disk, at a few gigabytes a second."""
    sum_so_far = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sum_so_far = zlib.crc32(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode(), sum_so_far)
        if tensor.numel():
            sum_so_far = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, sum_so_far)
    return f"{sum_so_far:08x}"
