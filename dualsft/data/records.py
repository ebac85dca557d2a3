"""Records: the pool as JSON lines, in source order. A record's row, from 0, is its ``example_id`` everywhere."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from json import JSONDecodeError
from typing import Any

from dualsft.data.files import SourceLine, find_source
from dualsft.data.json_text import parsed
from dualsft.data.texts import as_messages
from dualsft.errors import UserError


@dataclass(frozen=True, eq=False, repr=False)
class Records:
    """A sequence of records; only their lines are kept and a record is parsed when asked for.

    Attributes:
        columns: Every key that occurs, in order of first appearance.
        fingerprint: SHA-256 (hex) over the lines: equal exactly when the lines are.
        left_out: Names of what lies in the source's folder and was not read.
    """

    columns: tuple[str, ...]
    fingerprint: str
    _lines: tuple[SourceLine, ...]
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return json.loads(self._lines[row].text)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (json.loads(line.text) for line in self._lines)

    def line(self, row: int) -> str:
        """The record as one JSON line without its line end; the line itself if the source is JSON lines."""
        return self._lines[row].text

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the files, or of the dataset, that the records come from."""
        return tuple(dict.fromkeys(line.source for line in self._lines))

    def source_of(self, row: int) -> str:
        """Name of the file, or of the dataset, that a record comes from."""
        return self._lines[row].source

    def location(self, row: int) -> str:
        """The place of the record in its source, as ``pool.jsonl, line 3 (row 2)``: lines from 1, rows from 0."""
        return self._lines[row].location(row)


def read_records(path: str, split: str = "train") -> Records:
    """Reads and checks every record of a file, a folder or a Hugging Face dataset.

    Raises:
        UserError: If the source is missing, unreadable or holds no record, or if a row is not a JSON object.
    """
    source = find_source(path, split)
    records = build_records(source.lines, source.left_out)
    if not len(records):
        raise UserError(f"{path} holds no record.")
    return records


def build_records(lines: Iterable[SourceLine], left_out: tuple[str, ...] = ()) -> Records:
    """Refuses a line that is not a JSON object, and gathers the columns."""
    columns: dict[str, None] = {}
    digest = hashlib.sha256()
    kept: list[SourceLine] = []
    for row, line in enumerate(lines):
        columns.update(dict.fromkeys(_parse(line, row)))
        digest.update(line.text.encode() + b"\n")
        kept.append(line)
    return Records(tuple(columns), digest.hexdigest(), tuple(kept), left_out)


def _parse(line: SourceLine, row: int) -> dict[str, Any]:
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


def record_text(record: Mapping[str, Any], columns: Iterable[str]) -> str:
    """The text of a record: prompt before response, one line per text; a conversation gives its turns' contents.

    The columns are those of `FormatOptions.text_columns`; absent and null ones add nothing.
    """
    values = map(record.get, columns)
    return "\n".join(text for value in values for text in _texts(as_messages(value) or value))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            if key not in ("role", "from"):  # who speaks is not part of the text
                yield from _texts(part)
    elif value is not None:
        yield str(value)
