"""Records: the pool as JSON lines, in source order. A record's row, from 0, is its ``example_id`` everywhere."""

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from dualsft.data import cache_folder
from dualsft.data.files import SourceLine, Unit, record_of
from dualsft.data.finding import find_source
from dualsft.data.labels import labelled, labelling
from dualsft.data.lines import Lines, LinesWriter
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
        unit: What its records are numbered by: their lines in it, or their rows.
    """

    start: int
    columns: tuple[str, ...]
    source: SourceOptions = SourceOptions("")
    number: tuple[int, ...] = (0,)
    label: str = ""
    file: str = ""
    unit: Unit = "line"

    @property
    def title(self) -> str:
        """What people call the file, or the source that it is part of."""
        return self.source.name or self.label or self.file


@dataclass(frozen=True, eq=False, repr=False)
class Records:
    """A sequence of records; the bytes of their lines are kept and a record is parsed when asked for.

    Attributes:
        parts: The files, in the order of their records; those without a record are left out.
        fingerprint: SHA-256 (hex) over the lines: equal exactly when the lines are.
        left_out: Names of what lies in the sources' folders and was not read.
        remarks: A sentence on each source of which only a part was taken.
    """

    parts: tuple[Part, ...]
    fingerprint: str
    _lines: Lines
    left_out: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return json.loads(self._lines.text(row))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    @property
    def is_large(self) -> bool:
        """Whether they are so many that they are cached, and encoded by several processes, unasked."""
        return self._lines.size >= cache_folder.LARGE

    @property
    def columns(self) -> tuple[str, ...]:
        """Every key that occurs, in order of first appearance."""
        return tuple(dict.fromkeys(column for part in self.parts for column in part.columns))

    def line(self, row: int) -> str:
        """The record as one JSON line without its line end; the line itself if the source is JSON lines."""
        return self._lines.text(row)

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
        part = self.parts[self.part(row)]
        return labelled(part.label, SourceLine("", part.file, self._lines.number(row), part.unit).location(row))

    def source_line(self, row: int) -> SourceLine:
        """The record's line as it was read."""
        part = self.parts[self.part(row)]
        return SourceLine(self._lines.text(row), part.file, self._lines.number(row), part.unit)


def read_records(given: Given, split: str = "train", key: str = "data", cache_dir: str | None = None) -> Records:
    """Reads and checks every record of a source, or of several end to end; see `dualsft.data.sources`.

    Args:
        given: The sources.
        split: Split of those that do not name their own, where they are folders or datasets with several.
        key: The option that gives them, for messages.
        cache_dir: Folder for the lines of a large pool, which stay there as long as the records are used; None for the
            default's.

    Raises:
        UserError: If a source is missing, unreadable or holds no record, or if a row is not a JSON object.
    """
    sources, gathered = sources_of(given, key), _Gathered(cache_dir)
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


def _selected(part: Part, cache_dir: str | None) -> list[_Unread]:
    """The records that a selection chose, each read as in the pool that it was made from."""
    source = part.source
    whole = read_records(*made_from(source.path), cache_dir=cache_dir)
    ids, files = selected_ids(source.path, whole), list[_Unread]()
    for own, last in zip(whole.parts, [*(of.start for of in whole.parts[1:]), len(whole)], strict=True):
        merged = replace(own.source, name=source.name or own.source.name, reading=source.reading or own.source.reading)
        of = own._replace(source=merged, number=(*part.number, *own.number), label=part.label or own.label)
        files.append((map(whole.source_line, ids[bisect_left(ids, own.start) : bisect_left(ids, last)]), of))
    return files


class _Gathered:
    """The records of the files that have been read so far."""

    def __init__(self, cache_dir: str | None = None) -> None:
        self._cache_dir, self._lines = cache_dir, LinesWriter(cache_dir)
        self._digest = hashlib.sha256()
        self._parts: list[Part] = []
        self._left_out: tuple[str, ...] = ()
        self._remarks: list[str] = []

    def add(self, part: Part, split: str) -> None:
        """Read the files of a source, of which ``part`` has what is known before."""
        source, before = part.source, len(self._lines)
        with labelling(part.label):
            files = _selected(part, self._cache_dir) if is_selection(source.path) else self._found(part, split)
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
        whole, found = LinesWriter(self._cache_dir), list[tuple[Part, int, int]]()
        for unread, part in files:
            start = len(whole)
            with labelling(part.label):
                for line in unread:
                    whole.add(line.text.encode(), line.number)
                    part = part._replace(file=line.source, unit=line.unit) if start == len(whole) - 1 else part
            found.append((part, start, len(whole)))
        lines = whole.lines()
        chosen = taken_rows(source, len(lines))
        if len(chosen) < len(lines):
            self._remarks.append(told(source, source.name or source.path, len(lines)))
        for part, start, end in found:
            rows = chosen[bisect_left(chosen, start) : bisect_left(chosen, end)]
            yield (SourceLine(lines.text(row), part.file, lines.number(row), part.unit) for row in rows), part

    def add_file(self, lines: Iterable[SourceLine], part: Part) -> None:
        """Add the records of a file."""
        columns: dict[str, None] = {}
        start = len(self._lines)
        for line in lines:
            columns.update(dict.fromkeys(record_of(line, len(self._lines))))
            raw = line.text.encode()
            self._digest.update(raw + b"\n")
            self._lines.add(raw, line.number)
            part = part._replace(file=line.source, unit=line.unit) if len(self._lines) == start + 1 else part
        if len(self._lines) > start:
            self._parts.append(part._replace(start=start, columns=tuple(columns)))

    def records(self) -> Records:
        """All of them."""
        lines, refusal = self._lines.lines(), self._lines.refusal
        if refusal is not None:
            self._remarks.append(
                cache_folder.refused(
                    cache_folder.cache_folder(self._cache_dir), refusal, "the records are kept in memory"
                )
            )
        return Records(tuple(self._parts), self._digest.hexdigest(), lines, self._left_out, tuple(self._remarks))
