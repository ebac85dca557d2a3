"""Encoded pools: chunks of examples gathered in memory, or as a folder of Arrow files that are mapped into it.

examples.arrow    example_id, input_ids, labels: what batches are made of, in record batches of a chunk each
rows.arrow        status, num_tokens, lengths: what is known of each example
about.json        checksums of both, and what else there is to know; written last
"""

import hashlib
import json
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from jaxtyping import Int, Int8

from dualsft.data.supervision import Chunks
from dualsft.storage.checksums import check_file, file_checksum
from dualsft.storage.writing import replacing

if TYPE_CHECKING:
    import datasets

_EXAMPLES, _ROWS, _ABOUT = "examples.arrow", "rows.arrow", "about.json"
_TOKENS = pa.list_(pa.int32())
_COLUMNS = pa.schema([("example_id", pa.int64()), ("input_ids", _TOKENS), ("labels", _TOKENS)])
_OF_ROWS = ("status", "num_tokens", "lengths")


@dataclass(frozen=True, eq=False, repr=False)
class Encoded:
    """What encoding makes of n records; the columns are those of `dualsft.data.examples.Examples`."""

    dataset: "datasets.Dataset"
    status: Int8[np.ndarray, " example"]
    num_tokens: Int[np.ndarray, " example"]
    lengths: Int[np.ndarray, " example"]
    remarks: tuple[str, ...]


def in_memory(chunks: Chunks) -> Encoded:
    """The examples of all chunks, in memory."""
    import datasets  # takes most of a second, which help and configurations need not wait for

    rows = _Rows()
    table = pa.Table.from_batches(list(rows.batches(chunks)), _COLUMNS)
    dataset = datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=rows.fingerprint)
    status, num_tokens, lengths = rows.columns()
    return Encoded(dataset, status, num_tokens, lengths, tuple(rows.remarks))


def write_encoded(chunks: Chunks, folder: Path) -> None:
    """Writes the examples of all chunks into a folder, where they count once the last file is there.

    Raises:
        OSError: If they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = _Rows()
    with closing(rows.batches(chunks)) as batches:
        _write(batches, _COLUMNS, folder / _EXAMPLES)
    batch = pa.record_batch(dict(zip(_OF_ROWS, rows.columns(), strict=True)))
    _write([batch], batch.schema, folder / _ROWS)
    about = {
        "checksums": {name: file_checksum(folder / name) for name in (_EXAMPLES, _ROWS)},
        "fingerprint": rows.fingerprint,
        "remarks": list(rows.remarks),
    }
    with replacing(folder / _ABOUT) as partial:
        partial.write_text(json.dumps(about, indent=1), encoding="utf-8")


def read_encoded(folder: Path) -> Encoded | None:
    """The examples in a folder, mapped into memory; None where they are missing, not whole or damaged."""
    import datasets

    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        for name in (_EXAMPLES, _ROWS):
            check_file(folder / name, str(about["checksums"][name]))
        table = datasets.table.MemoryMappedTable.from_file(str(folder / _EXAMPLES))
        of_rows = pa.ipc.open_stream(pa.memory_map(str(folder / _ROWS))).read_all()
        status, num_tokens, lengths = (of_rows[name].chunk(0).to_numpy() for name in _OF_ROWS)
        dataset = datasets.Dataset(table, fingerprint=str(about["fingerprint"]))
        return Encoded(dataset, status, num_tokens, lengths, tuple(map(str, about["remarks"])))
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException):
        return None


def _write(batches: Iterable[pa.RecordBatch], schema: pa.Schema, path: Path) -> None:
    with replacing(path) as partial, partial.open("wb") as stream, pa.ipc.new_stream(stream, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


class _Rows:
    """What is known of each example, gathered as chunks go by.

    Attributes:
        remarks: What a user should know, each sentence once.
    """

    def __init__(self) -> None:
        self._digest, self.remarks = hashlib.sha256(), dict[str, None]()
        self._columns: tuple[list[np.ndarray], ...] = ([], [], [])

    def batches(self, chunks: Chunks) -> Generator[pa.RecordBatch, None, None]:
        """Yield the examples of each chunk as a record batch."""
        start = 0
        with closing(chunks):
            for chunk in chunks:
                for array in (chunk.lengths, chunk.input_ids, chunk.labels):
                    self._digest.update(array.tobytes())
                for column, array in zip(self._columns, (chunk.status, chunk.num_tokens, chunk.lengths), strict=True):
                    column.append(array)
                self.remarks |= dict.fromkeys(chunk.remarks)
                ids = pa.array(np.arange(start, start := start + len(chunk.lengths), dtype=np.int64))
                tokens = [_lists(values, chunk.lengths) for values in (chunk.input_ids, chunk.labels)]
                yield pa.record_batch([ids, *tokens], _COLUMNS)

    @property
    def fingerprint(self) -> str:
        """A hash of the content: the one that `datasets` would make pickles the whole table."""
        return self._digest.hexdigest()[:32]

    def columns(self) -> tuple[np.ndarray, ...]:
        """Status, supervised tokens and tokens of each example."""
        return tuple(np.concatenate(column) for column in self._columns)


def _lists(values: Int[np.ndarray, " token"], lengths: Int[np.ndarray, " example"]) -> pa.ListArray:
    offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
