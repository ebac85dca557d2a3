"""Values of a column as text: what counts as text, and what as missing."""

import base64
import datetime
import decimal
import math
import uuid
from typing import Any

_PARTS = (None, "text", "input_text", "output_text")
_WRITTEN_OUT = (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID)


def is_missing(value: Any) -> bool:
    """Whether a value is null, or the NaN that pandas and JSON writers put in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_text(value: Any) -> str | None:
    """A text, or the texts of a list of parts ``{type: text, text}`` end to end; None for anything else."""
    if isinstance(value, list) and value and all(map(_is_text_part, value)):
        return "".join(part["text"] for part in value)
    return value if isinstance(value, str) else None


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _PARTS and isinstance(part.get("text"), str)


def to_json(value: Any) -> Any:
    """What JSON holds in place of a value that it has no kind for; a ``default`` of `json.dumps`.

    Bytes are text if they are UTF-8. Otherwise, as in an image, they become an object, which no column of text takes.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode()}
    return str(value) if isinstance(value, _WRITTEN_OUT) else {"type": type(value).__name__}
