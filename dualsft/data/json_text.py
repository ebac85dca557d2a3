"""Parses JSON, and refuses what it leaves open: of two values under one key it would drop the first."""

import json
from typing import Any


def parsed(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: If it is not JSON (a `json.JSONDecodeError`), holds one key twice, or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"two values under the key {next(key for key in keys if keys.count(key) > 1)!r}")
    return record
