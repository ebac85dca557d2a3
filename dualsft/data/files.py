"""Files, folders and Hugging Face datasets -> one JSON line per record.

Every source is brought to the same form, a JSON line and the place it came from, so that nothing after this module
knows about file kinds. JSON lines are passed on verbatim: a selection hands its records back byte for byte.
"""

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NamedTuple

from dualsft.data.folders import files_of, listed
from dualsft.data.json_text import parsed
from dualsft.data.tables import arrow_records, dumped, is_saved_to_disk, parquet_records, saved_records
from dualsft.data.text_lines import COMPRESSED, text_lines
from dualsft.data.texts import is_conversation
from dualsft.errors import UserError, first_line
from dualsft.storage.hub import OFFLINE, cache_alone_when_offline
from dualsft.storage.paths import expanded, named

_LARGEST_CSV_FIELD = 2**31 - 1  # the csv module's own limit, 128 KiB, is below the length of long documents
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PART_OF_SPLIT = re.compile(r"\[|\+")
_EXTENSION = re.compile(r"\.[A-Za-z]\w*$")
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
_NOTHING = {"#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"}
_NOTHING |= {"<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
"""Cells of a CSV file that stand for no value, as to pandas and `datasets.load_dataset`."""


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


class Source(NamedTuple):
    """A file, a folder or a dataset that has been found, and not yet read.

    Attributes:
        lines: Its records.
        left_out: Names of what lies in the folder beside the files that are read.
    """

    lines: Iterator[SourceLine]
    left_out: tuple[str, ...] = ()


def find_source(path: str, split: str) -> Source:
    """Finds a file, a folder of files or, where nothing of that name exists, a Hugging Face dataset.

    Of a folder with several splits the files of ``split`` are read, by name.

    Raises:
        UserError: If there is nothing to read at ``path``; iteration raises it for what cannot be read.
    """
    if not path:
        raise UserError(f"The source is an empty text: give {_SOURCES}.")
    place = Path(expanded(path))
    try:
        if place.exists() and (part := _PART_OF_SPLIT.search(split)):
            raise UserError(
                f"{named(path)} is read whole, so that {split!r} says nothing: {part[0]!r} is for splits of Hugging "
                "Face datasets; write the rows to be read to a file."
            )
        if place.is_dir():
            return _folder(place, split)
        if place.exists():
            return Source(_reader(place)(place))
    except OSError as error:
        raise UserError(f"{named(error.filename or place)} cannot be read ({error.strerror}).") from error
    if _HUB_ID.fullmatch(path) and not _EXTENSION.search(path):
        return Source(_hub_lines(path, split))
    raise UserError(f"{named(path)} does not exist: give {_SOURCES}.")


def _folder(folder: Path, split: str) -> Source:
    if is_saved_to_disk(folder):
        return Source(_table_lines(saved_records(folder, split), folder.name))
    files, left_out = files_of(folder, split, lambda file: _kind(file) in _READERS)
    if not files:
        others = f", but {listed(left_out)}" if left_out else ""
        raise UserError(f"The folder {named(folder)} holds no {_KINDS} file{others}.")
    return Source((line for file in files for line in _reader(file)(file)), left_out)


def _kind(file: Path) -> str:
    """The ending that tells how a file is read: of a compressed one that before the compression's."""
    endings = [ending.lower() for ending in file.suffixes[-2:]]
    is_compressed = len(endings) == 2 and endings[1] in COMPRESSED and endings[0] in _COMPRESSIBLE
    return endings[0] if is_compressed else "".join(endings[-1:])


def _reader(file: Path) -> Callable[[Path], Iterator[SourceLine]]:
    if (kind := _kind(file)) in _READERS:
        return _READERS[kind]
    if kind in (*_ARCHIVES, *COMPRESSED):
        what = "an archive" if kind in _ARCHIVES else f"compressed, and {', '.join(_COMPRESSIBLE)} alone may be"
        raise UserError(f"{named(file)} is {what}: unpack it, and give the file or the folder in it.")
    raise UserError(f"{named(file)} is not a kind of file that can be read: give a {_KINDS} file.")


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
    yield from _table_lines(records, file.name)


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


def _table_lines(records: Iterable[Any], name: str) -> Iterator[SourceLine]:
    return (SourceLine(dumped(record, name), name, None) for record in records)


def _parquet_lines(file: Path) -> Iterator[SourceLine]:
    return _table_lines(parquet_records(file), file.name)


def _arrow_lines(file: Path) -> Iterator[SourceLine]:
    return _table_lines(arrow_records(file), file.name)


def _hub_lines(name: str, split: str) -> Iterator[SourceLine]:
    import datasets  # takes most of a second

    with cache_alone_when_offline() as offline:
        try:
            records = datasets.load_dataset(name, split=split)
        except Exception as error:  # the hub's client raises many kinds, none of them worded for users
            raise UserError(
                f"{name} is neither a file or folder here nor a Hugging Face dataset that can be loaded "
                f"(split {split!r}): {OFFLINE if offline else first_line(error)}"
            ) from error
    yield from _table_lines(records, f"{name} [{split}]")


_READERS: dict[str, Callable[[Path], Iterator[SourceLine]]] = {
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
_KINDS = ", ".join(_READERS)
_SOURCES = f"a {_KINDS} file, a folder of them or a Hugging Face dataset id"
