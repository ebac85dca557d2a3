"""The words of a record, in the columns that its format reads, without a tokenizer."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def record_text(record: Mapping[str, Any], columns: Iterable[str]) -> str:
    """What a record says, prompt before response, a line to each text; of a conversation what the turns say.

    Args:
        record: The record.
        columns: Those that its format reads, see `FormatOptions.text_columns`; what is absent or null says nothing.
    """
    return "\n".join(text for column in columns for text in _texts(record.get(column)))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            if key != "role":  # who speaks is not what is said
                yield from _texts(part)
    elif value is not None:
        yield str(value)
