"""Writing and reading a safetensors file one tensor at a time; what is written has the same bytes on every run.

    8 bytes     length of the header, little-endian
    header      JSON: name -> dtype, shape and [begin, end) in the rest; "__metadata__" -> strings
    tensors     row-major, without gaps, the widest types first, so that each is aligned

The writer of safetensors needs all tensors in memory at once, and writes several entries of metadata in an order that
changes from run to run. Its reader maps the file into memory: what was read once counts as the process's until the last
tensor of the file is gone. Format: https://github.com/huggingface/safetensors#format

The metadata may hold a checksum of the file, ``crc32``: of its bytes, with 00000000 in the place of the checksum.
"""

import json
import os
import re
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dualsft.models.lazy import LazyTensors
from dualsft.storage.checksums import OTHER_BYTES, as_text, checksum_of_rest

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The types by their names in the format."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHECKSUM, _BLANK = "crc32", b"00000000"
_PLACE = re.compile(rb'"crc32":"(.{8})"', re.DOTALL)  # quotes within a JSON string are escaped


@dataclass(frozen=True)
class TensorSpec:
    """The type and shape of a tensor, known before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        """The type and shape of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))


def file_order(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The names of a file's tensors in the order in which `write_tensors` reads and writes them."""
    return sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))


def write_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    *,
    checksum: bool = False,
) -> None:
    """Write a safetensors file, with a checksum or without.

    ``read`` returns the tensor of a name, and memory holds one at a time.
    """
    names = file_order(specs)
    entries = {**metadata, _CHECKSUM: _BLANK.decode()} if checksum else metadata
    begin = _header(specs, names, entries)
    sum_so_far = zlib.crc32(begin)
    with open(path, "wb") as stream:
        stream.write(begin)
        for name in names:
            tensor = read(name)
            if TensorSpec.of(tensor) != specs[name]:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced was {specs[name]}")
            data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            stream.write(data)
            sum_so_far = zlib.crc32(data, sum_so_far) if checksum else 0
            del tensor, data
        if checksum and (place := _PLACE.search(begin)):
            stream.seek(place.start(1))
            stream.write(as_text(sum_so_far).encode())
        stream.flush()
        os.fsync(stream.fileno())


def _header(specs: Mapping[str, TensorSpec], names: Sequence[str], metadata: Mapping[str, str]) -> bytes:
    """What stands before the tensors: the header, and its length."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        dtype, shape = specs[name].dtype, specs[name].shape
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class OpenTensors(LazyTensors):
    """The tensors of a safetensors file, each read into memory of its own at every use.

    The file stays open, so that on Linux and macOS it can be deleted or replaced, and is read as it was.

    Attributes:
        specs: Name -> type and shape.
        metadata: The file's strings by name.

    Raises:
        OSError, ValueError, KeyError, SafetensorError: if it cannot be read, is none, or has a type unknown here.
    """

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as checked:  # the header is sound, and the file of its length
            self.metadata: dict[str, str] = checked.metadata() or {}
        self._reader = _Reader(path)
        self.specs = self._reader.specs
        super().__init__(self.specs, self._reader.read)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows (of dimension 0) of a tensor; no others are read."""
        return self._reader.read(name, range(start, stop))


class _Reader:
    """Reads the tensors of a sound safetensors file; its file is closed when nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        self._stream = open(path, "rb", buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._stream.close)
        length = int.from_bytes(self._stream.read(8), "little")
        header = json.loads(self._stream.read(length))
        header.pop("__metadata__", None)
        self.specs = {name: TensorSpec(DTYPES[of["dtype"]], tuple(of["shape"])) for name, of in header.items()}
        self._begins = {name: 8 + length + of["data_offsets"][0] for name, of in header.items()}

    def read(self, name: str, rows: range | None = None) -> Tensor:
        spec, begin = self.specs[name], self._begins[name]
        if rows is not None:
            begin += rows.start * prod(spec.shape[1:]) * spec.dtype.itemsize
            spec = TensorSpec(spec.dtype, (len(rows), *spec.shape[1:]))
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        rest = tensor.reshape(-1).view(torch.uint8).numpy().data
        self._stream.seek(begin)
        while rest:  # the system reads up to 2 GiB at a time
            if not (count := self._stream.readinto(rest)):
                raise ValueError(f"{self._stream.name} ends before {name} does")
            rest = rest[count:]
        return tensor


def check_tensors(path: Path) -> None:
    """Raise a ValueError if a safetensors file holds other bytes than its checksum, if it has one, is of."""
    with open(path, "rb") as stream:
        length = stream.read(8)
        begin = length + stream.read(int.from_bytes(length, "little"))
        if not (place := _PLACE.search(begin)):
            return
        blank = begin[: place.start(1)] + _BLANK + begin[place.end(1) :]
        if as_text(checksum_of_rest(stream, zlib.crc32(blank))).encode() != place[1]:
            raise ValueError(OTHER_BYTES)
