"""Values of a record's columns as texts and answers; what cannot be one is refused by column, file and row."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dualsft.data.texts import as_text, is_missing
from dualsft.errors import UserError

Record = Mapping[str, Any]


def value_of(record: Record, column: str, where: str) -> Any:
    """The value of a column, which the record must have."""
    if column not in record:
        raise UserError(f"{where}: no column {column!r} (the record has {', '.join(record) or 'none'}).")
    return record[column]


def text_of(record: Record, column: str, where: str) -> str:
    """The text of a column, which must be one."""
    value = value_of(record, column, where)
    text = as_text(value)
    if text is None:
        kind = "null" if value is None else type(value).__name__
        raise UserError(f"{where}: {column!r} must be text, not {kind}.")
    return text


def text_or_nothing(record: Record, column: str, where: str) -> str:
    """The text of a column; empty if the record has none there."""
    return "" if is_missing(record.get(column)) else text_of(record, column, where)


def answer_of(record: Record, columns: Sequence[str], others: Sequence[str], where: str) -> str:
    """The response, in the one of the columns that has any; refuses different ones, and one in another column.

    Args:
        record: The record.
        columns: The columns that are read.
        others: Columns that are not, and have a usual name of a response.
        where: Its place.
    """
    present = [column for column in columns if column in record] or columns[:1]
    answers = {column: _said(record, column, where) for column in present}
    given = {column: answer for column, answer in answers.items() if answer.strip()}
    if not given:
        check_others(record, present[0], others, where)
        return answers[present[0]]
    check_alike(given, where)
    return next(iter(given.values()))


def check_alike(given: Mapping[str, Any], where: str) -> None:
    """Refuses answers, by column, that differ."""
    first, *more = given.values()
    if any(answer != first for answer in more):
        raise UserError(
            f"{where}: {' and '.join(map(repr, given))} hold different answers; name the one to read with "
            "data.response_column."
        )


def check_others(record: Record, column: str, others: Sequence[str], where: str) -> None:
    """Refuses a record without an answer in a column if one of the others, which are not read, has it."""
    for other in others:
        if (as_text(record.get(other)) or "").strip():
            raise UserError(
                f"{where}: {column!r} holds no answer but {other!r} does; give all records the same columns, or name "
                "the one to read with data.response_column."
            )


def _said(record: Record, column: str, where: str) -> str:
    """A response: a missing one is empty, and a number or truth value (a label, a result) is written out."""
    value = value_of(record, column, where)
    if is_missing(value):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) and math.isfinite(value) else text_of(record, column, where)
