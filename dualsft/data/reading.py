"""How the records of a pool are read: each file by its own columns, and by what its source says of itself."""

from collections.abc import Callable
from typing import NamedTuple

from dualsft.data.options import Format, FormatOptions
from dualsft.data.records import Part, Records
from dualsft.data.texts import record_text
from dualsft.errors import UserError


class Reading(NamedTuple):
    """One way of reading records.

    Attributes:
        options: The options for these records.
        format: The format that they have, never ``auto``.
        columns: The columns whose text is theirs: prompt before response.
        others: Columns with a usual name of a response that are not read.
    """

    options: FormatOptions
    format: Format
    columns: tuple[str, ...]
    others: tuple[str, ...]


def readings(records: Records, options: FormatOptions) -> list[Reading]:
    """The reading of each of the records' parts.

    Raises:
        UserError: If the columns of one fit no format.
    """
    return [_reading(part, options.within(part.source.reading)) for part in records.parts]


def _reading(part: Part, options: FormatOptions) -> Reading:
    try:
        name = options.recognise(part.columns)
    except UserError as error:
        raise UserError(f"{part.title}: {error}") from error
    return Reading(options, name, options.text_columns(part.columns), options.other_answers(part.columns))


def text_reader(records: Records, options: FormatOptions) -> Callable[[int], str]:
    """A function that gives the text of a record by its row: of the columns that its format reads."""
    found = readings(records, options)
    return lambda row: record_text(records[row], found[records.part(row)].columns)
