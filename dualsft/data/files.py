"""Files, folders and Hugging Face datasets -> one JSON line per record.

Every source is brought to the same form, a JSON line and the place it came from, so that nothing after this module
knows about file kinds. JSON lines are passed on verbatim: a selection hands its records back byte for byte.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dualsft.errors import UserError

_LARGEST_CSV_FIELD = 2**31 - 1  # the csv module's own limit, 128 KiB, is below the length of long documents
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_EXTENSION = re.compile(r"\.[A-Za-z]\w*$")


class SourceLine(NamedTuple):
    """One record and its place in the source.

    Attributes:
        text: The record as one JSON line, not yet checked.
        source: Name of the file or dataset.
        number: Line of the file on which the record starts, from 1; None where lines mean nothing.
    """

    text: str
    source: str
    number: int | None

    def location(self, row: int) -> str:
        """The place of the record, as ``pool.jsonl, line 3 (row 2)``: lines from 1, rows from 0."""
        return f"{self.source}, row {row}" if self.number is None else f"{self.source}, line {self.number} (row {row})"


def source_lines(path: str, split: str) -> Iterator[SourceLine]:
    """Reads a file, a folder of files (by name) or, where nothing of that name exists, a Hugging Face dataset.

    Raises:
        UserError: If there is nothing to read at ``path`` or it cannot be read.
    """
    place = Path(path)
    if place.is_dir():
        names = sorted(file for file in place.iterdir() if not file.name.startswith("."))
        files = [file for file in names if file.suffix.lower() in _READERS and file.is_file()]
        if not files:
            raise UserError(f"The folder {place} holds no {_KINDS} file.")
        for file in files:
            yield from _READERS[file.suffix.lower()](file)
    elif place.exists():
        if place.suffix.lower() not in _READERS:
            raise UserError(f"{place} is not a kind of file that can be read: give a {_KINDS} file.")
        yield from _READERS[place.suffix.lower()](place)
    elif _HUB_ID.fullmatch(path) and not _EXTENSION.search(path):
        yield from _hub_lines(path, split)
    else:
        raise UserError(f"{path} does not exist: give a {_KINDS} file, a folder of them or a Hugging Face dataset id.")


def _dump(record: Any) -> str:
    line = json.dumps(record, ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:  # a lone surrogate cannot be written as UTF-8, only escaped
        return json.dumps(record, default=str)
    return line


def _text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line with its end), split at LF alone: U+2028 and the like occur inside records."""
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                where = f"{file.name}, line {number}, byte {error.start + 1} of the line"
                raise UserError(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8.") from error


def _jsonl_lines(file: Path) -> Iterator[SourceLine]:
    for number, text in _text_lines(file):
        if text.strip():
            yield SourceLine(text.rstrip("\r\n"), file.name, number)


def _json_lines(file: Path) -> Iterator[SourceLine]:
    """A .json file: an array of records, an object around one such array, or JSON lines under another name."""
    text = "".join(line for _, line in _text_lines(file))
    try:
        content = json.loads(text)
    except JSONDecodeError as error:
        if not text.lstrip().startswith("["):
            yield from _jsonl_lines(file)  # names the broken line in its error
            return
        raise UserError(f"{file.name}, line {error.lineno}: not valid JSON ({error.msg}).") from error
    records = content if isinstance(content, list) else [content]
    if isinstance(content, dict) and len(content) == 1:
        (inner,) = content.values()
        if isinstance(inner, list) and not _is_conversation(inner):
            records = inner
    for record in records:
        yield SourceLine(_dump(record), file.name, None)


def _is_conversation(items: list[Any]) -> bool:
    """Tells one record ``{"messages": [...]}`` from an object that holds a list of records."""
    return bool(items) and all(isinstance(item, dict) and "role" in item for item in items)


def _csv_lines(file: Path) -> Iterator[SourceLine]:
    csv.field_size_limit(_LARGEST_CSV_FIELD)
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    rows = csv.reader((line for _, line in _text_lines(file)), delimiter=delimiter, strict=True)
    try:
        header = next(filter(None, rows), [])
        start = rows.line_num + 1
        for row in rows:
            if row and len(row) != len(header):
                raise UserError(f"{file.name}, line {start}: {len(row)} fields where the header names {len(header)}.")
            if row:
                yield SourceLine(_dump(dict(zip(header, row, strict=True))), file.name, start)
            start = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file.name}, line {rows.line_num}: not valid CSV ({error}).") from error


def _parquet_lines(file: Path) -> Iterator[SourceLine]:
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    yield SourceLine(_dump(record), file.name, None)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file.name} cannot be read as Parquet ({error}).") from error


def _hub_lines(name: str, split: str) -> Iterator[SourceLine]:
    import datasets  # takes most of a second

    try:
        records = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub's client raises many kinds, none of them worded for users
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name} is neither a file or folder here nor a Hugging Face dataset that can be loaded "
            f"(split {split!r}): {reason}"
        ) from error
    for record in records:
        yield SourceLine(_dump(record), f"{name} [{split}]", None)


_READERS: dict[str, Callable[[Path], Iterator[SourceLine]]] = {
    ".jsonl": _jsonl_lines,
    ".ndjson": _jsonl_lines,
    ".json": _json_lines,
    ".parquet": _parquet_lines,
    ".csv": _csv_lines,
    ".tsv": _csv_lines,
}
_KINDS = ", ".join(_READERS)
