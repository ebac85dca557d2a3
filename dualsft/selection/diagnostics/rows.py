"""Where the rows of a pool come from: a column of the records that says so, or the files of a folder."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from dualsft.allocators import DataAllocator, PerSourceQuota
from dualsft.data.examples import Examples
from dualsft.data.records import Records
from dualsft.selection.diagnostics.figures import Target
from dualsft.selection.diagnostics.levels import quantiles

COLUMN = "source"
"""The column that names a record's source, unless the allocator of the data is told of another."""


@dataclass(frozen=True)
class RowSources:
    """The source of every row.

    Attributes:
        column: The column that names it; None where it is the file.
        names: Row number -> source; empty text for a record without the column.
    """

    column: str | None
    names: tuple[str, ...]


def row_sources(records: Records, allocator: DataAllocator) -> RowSources | None:
    """The sources of a pool's rows; None if all are of one file and no column says more."""
    column = allocator.column if isinstance(allocator, PerSourceQuota) else COLUMN
    if _has(records, column):
        return RowSources(column, tuple(_named(records, column)))
    files = tuple(map(records.source_of, range(len(records))))
    return RowSources(None, files) if len(set(files)) > 1 else None


def _has(records: Records, column: str) -> bool:
    """Whether the records have this column; a named source's records have its name under `COLUMN`."""
    return column in records.columns or (column == COLUMN and any(part.source.name for part in records.parts))


def _named(records: Records, column: str) -> Iterable[str]:
    values = (records.with_source(row).get(column) for row in range(len(records)))
    return (str(value) if value is not None else "" for value in values)


def describe_target(sets: Iterable[Examples], column: str | None) -> Target:
    """The lengths of all validation rows with supervised tokens, and their sources if a column names those."""
    lengths: list[int] = []
    found: Counter[str] = Counter()
    for examples in sets:
        ids = examples.ok_ids()
        lengths += examples.num_tokens[ids].tolist()
        if column is not None and _has(examples.records, column):
            names = tuple(_named(examples.records, column))
            found.update(names[i] for i in ids)
    return Target(len(lengths), quantiles(lengths), dict(found.most_common()) or None)
