"""A file -> one JSON line per record.

Files of every kind are brought to the same form, a JSON line and the place it came from, so that nothing after this
module knows about kinds. JSON lines are passed on verbatim: a selection hands its records back byte for byte.
"""

import csv
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dualsft.data.json_text import parsed
from dualsft.data.tables import arrow_records, dumped, parquet_records
from dualsft.data.text_lines import COMPRESSED, text_lines
from dualsft.data.texts import is_conversation
from dualsft.errors import UserError
from dualsft.storage.paths import named

_LARGEST_CSV_FIELD = 2**31 - 1  # the csv module's own limit, 128 KiB, is below the length of long documents
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
_NOTHING = {"#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"}
_NOTHING |= {"<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
"""Cells of a CSV file that stand for no value, as to pandas and `datasets.load_dataset`."""


Unit = Literal["line", "row"]


class SourceLine(NamedTuple):
    """One record and its place in the source.

    Attributes:
        text: The record as one JSON line, not yet checked.
        source: Name of the file or dataset.
        number: Line of the file on which the record starts, from 1; where lines mean nothing its row, from 0.
        unit: Which of the two ``number`` is.
    """

    text: str
    source: str
    number: int
    unit: Unit = "line"

    def location(self, row: int) -> str:
        """The place of the record, as ``pool.jsonl, line 3 (row 2)``: lines from 1, rows from 0 over all sources."""
        if self.unit == "line":
            return f"{self.source}, line {self.number} (row {row})"
        return f"{self.source}, row {self.number}" + (f" (row {row} of all)" if row != self.number else "")


def record_of(line: SourceLine, row: int) -> dict[str, Any]:
    """The record of a line; refuses one that is not a JSON object."""
    try:
        record = parsed(line.text)
    except JSONDecodeError as error:
        reason = f"not valid JSON ({error.msg}, column {error.colno})"
        raise UserError(f"{line.location(row)}: {reason}; mend or remove this row.") from error
    except ValueError as error:
        raise UserError(f"{line.location(row)}: not a record ({error}); mend or remove this row.") from error
    if not isinstance(record, dict):
        raise UserError(f"{line.location(row)}: a record must be a JSON object, not {type(record).__name__}.")
    return record


def kind_of(file: Path) -> str:
    """The ending that tells how a file is read: of a compressed one that before the compression's."""
    endings = [ending.lower() for ending in file.suffixes[-2:]]
    is_compressed = len(endings) == 2 and endings[1] in COMPRESSED and endings[0] in _COMPRESSIBLE
    return endings[0] if is_compressed else "".join(endings[-1:])


def reader_of(file: Path) -> Callable[[Path], Iterator[SourceLine]]:
    """What reads a file of its kind.

    Raises:
        UserError: If no file of its kind can be read.
    """
    if (kind := kind_of(file)) in READERS:
        return READERS[kind]
    if kind in (*_ARCHIVES, *COMPRESSED):
        what = "an archive" if kind in _ARCHIVES else f"compressed, and {', '.join(_COMPRESSIBLE)} alone may be"
        raise UserError(f"{named(file)} is {what}: unpack it, and give the file or the folder in it.")
    raise UserError(f"{named(file)} is not a kind of file that can be read: give a {KINDS} file.")


def _jsonl_lines(file: Path) -> Iterator[SourceLine]:
    for number, text in text_lines(file):
        if text.strip():
            yield SourceLine(text.rstrip("\r\n"), file.name, number)


def _json_lines(file: Path) -> Iterator[SourceLine]:
    """A .json file: an array of records, an object around one such array, or JSON lines under another name."""
    text = "".join(line for _, line in text_lines(file))
    try:
        content = parsed(text)
    except JSONDecodeError as error:
        if not text.lstrip().startswith("["):
            yield from _jsonl_lines(file)  # names the broken line in its error
            return
        raise UserError(f"{file.name}, line {error.lineno}: not valid JSON ({error.msg}).") from error
    except ValueError as error:
        raise UserError(f"{file.name}: not a record ({error}); mend it.") from error
    records = content if isinstance(content, list) else [content]
    if isinstance(content, dict) and len(content) == 1:
        (inner,) = content.values()
        if isinstance(inner, list) and not is_conversation(inner):
            records = inner
    yield from table_lines(records, file.name)


def _csv_lines(file: Path, delimiter: str) -> Iterator[SourceLine]:
    csv.field_size_limit(_LARGEST_CSV_FIELD)
    rows = csv.reader((line for _, line in text_lines(file)), delimiter=delimiter, strict=True)
    try:
        header = next(filter(None, rows), [])
        if twice := [name for name in header if name and header.count(name) > 1]:
            raise UserError(f"{file.name} has two columns of the name {twice[0]!r}; give each a name of its own.")
        start = rows.line_num + 1
        for row in rows:
            if row and len(row) != len(header):
                raise UserError(f"{file.name}, line {start}: {len(row)} fields where the header names {len(header)}.")
            if row:
                cells = (None if cell in _NOTHING else cell for cell in row)
                yield SourceLine(dumped(dict(zip(header, cells, strict=True)), file.name), file.name, start)
            start = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file.name}, line {rows.line_num}: not valid CSV ({error}).") from error


def table_lines(records: Iterable[Any], name: str) -> Iterator[SourceLine]:
    """The records of a table of this name."""
    return (SourceLine(dumped(record, name), name, row, "row") for row, record in enumerate(records))


def _parquet_lines(file: Path) -> Iterator[SourceLine]:
    return table_lines(parquet_records(file), file.name)


def _arrow_lines(file: Path) -> Iterator[SourceLine]:
    return table_lines(arrow_records(file), file.name)


READERS: dict[str, Callable[[Path], Iterator[SourceLine]]] = {
    ".jsonl": _jsonl_lines,
    ".ndjson": _jsonl_lines,
    ".json": _json_lines,
    ".csv": partial(_csv_lines, delimiter=","),
    ".tsv": partial(_csv_lines, delimiter="\t"),
    ".parquet": _parquet_lines,
    ".arrow": _arrow_lines,
    ".feather": _arrow_lines,
}
_COMPRESSIBLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
KINDS = ", ".join(READERS)
