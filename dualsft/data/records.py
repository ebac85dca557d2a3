"""Records: the pool as JSON lines, in source order. A record's row, from 0, is its ``example_id`` everywhere."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from dualsft.data.files import SourceLine, record_of
from dualsft.data.finding import find_source
from dualsft.data.labels import labelled, labelling
from dualsft.data.sampling import taken_rows, told
from dualsft.data.selected import is_selection, made_from, selected_ids
from dualsft.data.sources import Given, SourceOptions, sources_of
from dualsft.errors import UserError


class Part(NamedTuple):
    """The records of one file.

    Attributes:
        start: Row of the first one.
        columns: Every key that occurs, in order of first appearance.
        source: The source that names the file.
        number: Which of the sources this is; of a selection's, which of those that it was made from, too.
        label: What the place of a record begins with: the source's name, what a glob matched, or the path where there
            are several sources.
        file: Name of the file.
    """

    start: int
    columns: tuple[str, ...]
    source: SourceOptions = SourceOptions("")
    number: tuple[int, ...] = (0,)
    label: str = ""
    file: str = ""

    @property
    def title(self) -> str:
        """What people call the file, or the source that it is part of."""
        return self.source.name or self.label or self.file


@dataclass(frozen=True, eq=False, repr=False)
class Records:
    """A sequence of records; only their lines are kept and a record is parsed when asked for.

    Attributes:
        parts: The files, in the order of their records; those without a record are left out.
        fingerprint: SHA-256 (hex) over the lines: equal exactly when the lines are.
        size: Bytes of the lines.
        left_out: Names of what lies in the sources' folders and was not read.
        remarks: A sentence on each source of which only a part was taken.
    """

    parts: tuple[Part, ...]
    fingerprint: str
    _lines: tuple[SourceLine, ...]
    size: int = 0
    left_out: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return json.loads(self._lines[row].text)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (json.loads(line.text) for line in self._lines)

    @property
    def columns(self) -> tuple[str, ...]:
        """Every key that occurs, in order of first appearance."""
        return tuple(dict.fromkeys(column for part in self.parts for column in part.columns))

    def line(self, row: int) -> str:
        """The record as one JSON line without its line end; the line itself if the source is JSON lines."""
        return self._lines[row].text

    def part(self, row: int) -> int:
        """The number of the file that holds a record, among ``parts``."""
        return bisect_right(self.parts, row, key=lambda part: part.start) - 1

    @property
    def sources(self) -> tuple[str, ...]:
        """The names that `source_of` gives, in the order of their records."""
        return tuple(dict.fromkeys(part.title for part in self.parts))

    def source_of(self, row: int) -> str:
        """The name of a record's source in a mapping of names; without one its path, or the file's in a folder."""
        return self.parts[self.part(row)].title

    def with_source(self, row: int) -> dict[str, Any]:
        """The record; where its source has a name, this is its value under ``source``."""
        name = self.parts[self.part(row)].source.name
        return {**self[row], "source": name} if name else self[row]

    def location(self, row: int) -> str:
        """The place of the record, as ``pool.jsonl, line 3 (row 2)``: lines from 1, rows from 0 over all sources."""
        return labelled(self.parts[self.part(row)].label, self._lines[row].location(row))


def read_records(given: Given, split: str = "train", key: str = "data") -> Records:
    """Reads and checks every record of a source, or of several end to end; see `dualsft.data.sources`.

    Args:
        given: The sources.
        split: Split of those that do not name their own, where they are folders or datasets with several.
        key: The option that gives them, for messages.

    Raises:
        UserError: If a source is missing, unreadable or holds no record, or if a row is not a JSON object.
    """
    sources, gathered = sources_of(given, key), _Gathered()
    for number, source in enumerate(sources):
        gathered.add(Part(0, (), source, (number,), source.name or (source.path if len(sources) > 1 else "")), split)
    return gathered.records()


def build_records(lines: Iterable[SourceLine]) -> Records:
    """The records of one file: refuses a line that is not a JSON object, and gathers the columns."""
    gathered = _Gathered()
    gathered.add_file(lines, Part(0, ()))
    return gathered.records()


_Unread = tuple[Iterable[SourceLine], Part]
"""The lines of a file, and what is known of it before they are read."""


def _selected(part: Part) -> list[_Unread]:
    """The records that a selection chose, each read as in the pool that it was made from."""
    source = part.source
    whole = read_records(*made_from(source.path))
    ids, files = selected_ids(source.path, whole), list[_Unread]()
    for own, last in zip(whole.parts, [*(of.start for of in whole.parts[1:]), len(whole)], strict=True):
        merged = replace(own.source, name=source.name or own.source.name, reading=source.reading or own.source.reading)
        of = own._replace(source=merged, number=(*part.number, *own.number), label=part.label or own.label)
        files.append(([whole._lines[i] for i in ids if own.start <= i < last], of))
    return files


class _Gathered:
    """The records of the files that have been read so far."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._lines: list[SourceLine] = []
        self._parts: list[Part] = []
        self._size = 0
        self._left_out: tuple[str, ...] = ()
        self._remarks: list[str] = []

    def add(self, part: Part, split: str) -> None:
        """Read the files of a source, of which ``part`` has what is known before."""
        source, before = part.source, len(self._lines)
        with labelling(part.label):
            files = _selected(part) if is_selection(source.path) else self._found(part, split)
        for lines, of in self._sampled(files, source) if source.is_sampled else files:
            with labelling(of.label):
                self.add_file(lines, of)
        if len(self._lines) == before:
            raise UserError(f"{source.path} holds no record.")

    def _found(self, part: Part, split: str) -> list["_Unread"]:
        """The files behind a source's path."""
        source = part.source
        found = find_source(source.path, source.split or split)
        self._left_out += found.left_out
        return [(file.lines, part._replace(label=source.name or file.match or part.label)) for file in found.files]

    def _sampled(self, files: list["_Unread"], source: SourceOptions) -> Iterator["_Unread"]:
        """The lines of each file of a source that are taken."""
        whole: list[tuple[list[SourceLine], Part]] = []
        for unread, part in files:
            with labelling(part.label):
                whole.append((list(unread), part))
        count = sum(len(lines) for lines, _ in whole)
        chosen, start = set(taken_rows(source, count)), 0
        if len(chosen) < count:
            self._remarks.append(told(source, source.name or source.path, count))
        for lines, part in whole:
            yield [line for row, line in enumerate(lines, start) if row in chosen], part
            start += len(lines)

    def add_file(self, lines: Iterable[SourceLine], part: Part) -> None:
        """Add the records of a file."""
        columns: dict[str, None] = {}
        start = len(self._lines)
        for line in lines:
            columns.update(dict.fromkeys(record_of(line, len(self._lines))))
            raw = line.text.encode() + b"\n"
            self._digest.update(raw)
            self._size += len(raw)
            self._lines.append(line)
        if len(self._lines) > start:
            file = self._lines[start].source
            self._parts.append(part._replace(start=start, columns=tuple(columns), file=file))

    def records(self) -> Records:
        """All of them."""
        fingerprint, lines = self._digest.hexdigest(), tuple(self._lines)
        return Records(tuple(self._parts), fingerprint, lines, self._size, self._left_out, tuple(self._remarks))
