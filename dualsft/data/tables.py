"""Tables (Parquet, Arrow, what `datasets` loads) -> records of JSON values.

Text is text whatever its physical type: dictionaries (categories), large strings, bytes that are UTF-8. Numbers stay
numbers; dates, times, decimals and UUIDs are written out.
"""

import base64
import json
from collections.abc import Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq

from dualsft.data.text_lines import refuse_pointer
from dualsft.errors import UserError, first_line

_AT_ONCE = 1024
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_WRITTEN_OUT = (date, time, timedelta, Decimal, UUID)
_UNREADABLE = (pa.ArrowException, OSError, ValueError, OverflowError, LookupError)  # the last for unknown time zones


def parquet_records(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file.

    Raises:
        UserError: If it cannot be read, or two columns have one name.
    """
    _refuse_pointer(file)
    try:
        with pq.ParquetFile(file) as parquet:
            _check_names(file.name, parquet.schema_arrow.names)
            for batch in parquet.iter_batches(batch_size=_AT_ONCE):
                yield from batch.to_pylist()
    except _UNREADABLE as error:
        raise UserError(f"{file.name} cannot be read as Parquet ({first_line(error)}).") from error


def arrow_records(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow file: a stream of batches, as `datasets` writes it, or a file with an index (Feather).

    Raises:
        UserError: If it cannot be read or has no end, or two columns have one name.
    """
    _refuse_pointer(file)
    try:
        with pa.memory_map(str(file)) as stored:
            if is_indexed := bytes(stored.read(6)) == b"ARROW1":
                stored.seek(0)
            else:
                stored.seek(max(0, stored.size() - len(_END_OF_STREAM)))
                if bytes(stored.read()) != _END_OF_STREAM:
                    raise UserError(f"{file.name} is cut short, or no Arrow file: write it again.")
                stored.seek(0)
            reader = pa.ipc.open_file(stored) if is_indexed else pa.ipc.open_stream(stored)
            _check_names(file.name, reader.schema.names)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_indexed else reader
            for batch in batches:
                for start in range(0, len(batch), _AT_ONCE):
                    yield from batch.slice(start, _AT_ONCE).to_pylist()
    except _UNREADABLE as error:
        raise UserError(f"{file.name} cannot be read as Arrow ({first_line(error)}).") from error


def saved_records(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a folder that `save_to_disk` wrote: a Dataset, or the split of a DatasetDict.

    Raises:
        UserError: If it cannot be read, or has no such split.
    """
    import datasets  # takes most of a second

    try:
        stored = datasets.load_from_disk(str(folder))
    except Exception as error:  # a missing file, bad JSON, a type of another version: the loader has a dozen kinds
        raise UserError(f"{folder}, written by save_to_disk, cannot be read ({first_line(error)}).") from error
    if isinstance(stored, datasets.DatasetDict):
        if split not in stored:
            raise UserError(
                f"The folder {folder} has the splits {', '.join(map(str, stored))}, but not {split!r}: name one of "
                "them as data.train_split or data.validation_split."
            )
        stored = stored[split]
    yield from stored


def is_saved_to_disk(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("state.json", "dataset_info.json")
    )


def dumped(record: Any, where: str) -> str:
    """The record as one JSON line, with text as it is.

    Raises:
        UserError: If it holds what JSON cannot, such as an image; ``where`` names the place.
    """
    try:
        line = json.dumps(record, ensure_ascii=False, default=_json_value)
        line.encode()
    except UnicodeEncodeError:  # a lone surrogate cannot be written as UTF-8, only escaped
        return json.dumps(record, default=_json_value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}; leave this column out.") from error
    return line


def _json_value(value: Any) -> Any:
    """What JSON has for a value of a table that it has no type for; bytes that are not text can be no one's text."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        raw = bytes(value)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(raw).decode()}
    if isinstance(value, _WRITTEN_OUT):
        return str(value)
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        return value.tolist()
    raise TypeError(f"it holds a {type(value).__name__}, which is neither text nor a number")


def _check_names(file: str, names: list[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{file} has two columns of the name {twice[0]!r}; give each a name of its own.")


def _refuse_pointer(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            refuse_pointer(file, stream.read(100))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}).") from error
