"""Values of a column as text: what counts as text, and what as missing."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dualsft.data.json_text import parsed

_PARTS = (None, "text", "input_text", "output_text")


def is_missing(value: Any) -> bool:
    """Whether a value is null, or the NaN that pandas and JSON writers put in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_text(value: Any) -> str | None:
    """A text, or the texts of a list of parts ``{type: text, text}`` end to end; None for anything else."""
    if isinstance(value, list) and value and all(map(_is_text_part, value)):
        return "".join(part["text"] for part in value)
    return value if isinstance(value, str) else None


def is_conversation(items: list[Any]) -> bool:
    """Whether a list is one of turns: objects that say who speaks."""
    return bool(items) and all(isinstance(item, dict) and {"role", "from"} & item.keys() for item in items)


def as_messages(value: Any) -> list[Any] | None:
    """A list of turns, or the list that a JSON text of one holds; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parsed(value)
        except ValueError:
            return None
    return value if isinstance(value, list) and is_conversation(value) else None


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _PARTS and isinstance(part.get("text"), str)


def record_text(record: Mapping[str, Any], columns: Iterable[str]) -> str:
    """The text of a record: prompt before response, one line per text; a conversation gives its turns' contents.

    The columns are those of `dualsft.data.options.FormatOptions.text_columns`; absent and null ones add nothing.
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
