"""JSON values read as values of Python types, with the key of one that does not fit, and descriptions of parts as JSON.

A reader of its own, because a library's (pydantic's) would report one error per type for a value that fits none of
several types, with the types' names in the key, and would need a schema for every class of a part.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_DUE: dict[Any, str] = {
    **{int: "an integer", float: "a number", str: "a string", bool: "true or false", NoneType: "null"},
    **{list: "a list", dict: "an object"},
}


class Mismatch(Exception):  # noqa: N818 (of a value with its type)
    """A key is missing, or holds another type than expected."""

    def __init__(self, key: str, problem: str = "is missing") -> None:
        super().__init__(f"{key} {problem}")
        self.key = key


@dataclass(frozen=True)
class Part:
    """A scorer, an allocator or a term of the objective: its class, and its options as `describe_part` gives them."""

    class_path: str
    options: dict[str, Any]
    private: dict[str, Any] | None = None


def describe_part(part: object) -> dict[str, Any]:
    """Describe a part by its ``class_path`` and its ``options``: all public attributes except ``needs``.

    Private attributes that are plain JSON values are given as ``private``: they may decide the outcome too.
    """
    kept = {name: value for name, value in vars(part).items() if name != "needs"}
    options = {name: _plain(value) for name, value in kept.items() if not name.startswith("_")}
    private = {name: _plain(value) for name, value in kept.items() if name.startswith("_") and _is_plain(value)}
    class_path = f"{type(part).__module__}.{type(part).__qualname__}"
    return {"class_path": class_path, "options": options, **({"private": private} if private else {})}


def at(stored: Any, key: str) -> Any:
    """The value of a JSON object at a key, or at SECTION.KEY; a `Mismatch` if there is none."""
    section, _, name = key.rpartition(".")
    found = typed(dict[str, Any], at(stored, section) if section else stored, section)
    if name not in found:
        raise Mismatch(key)
    return found[name]


def typed(kind: Any, value: Any, key: str) -> Any:
    """A JSON value as a value of a type: a plain one, a list or dictionary, a dataclass, or one of several.

    Any other class is that of a part, and is read as `Part`. A dataclass takes the keys that it knows.

    Raises:
        Mismatch: if the value, or one in it, has another type, or lacks a key; ``key`` is its place for the message.
    """
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Any or (origin is Literal and value in inner):
        return value
    if origin in (Union, UnionType):
        return _one_of(inner, value, key)
    if origin is list and isinstance(value, list):
        return [typed(inner[0], item, f"{key}[{k}]") for k, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {name: typed(inner[1], item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(origin, type) and origin not in _DUE and isinstance(value, dict):
        return _section(origin if is_dataclass(origin) else Part, value, key)
    if type(value) is origin:
        return value
    if origin is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    raise _other(value, key, _due(kind))


def _one_of(kinds: tuple[Any, ...], value: Any, key: str) -> Any:
    failures = []
    for kind in kinds:
        try:
            return typed(kind, value, key)
        except Mismatch as failure:
            failures.append(failure)
    closest = max(failures, key=lambda failure: len(re.findall(r"[.[]", failure.key)))  # its error is nested deepest
    raise closest if closest.key != key else _other(value, key, " or ".join(map(_due, kinds)))


def _section(kind: Any, value: Mapping[str, Any], key: str) -> Any:
    found = {}
    for of in fields(kind):
        place = f"{key}.{of.name}".lstrip(".")
        if of.name in value:
            found[of.name] = typed(of.type, value[of.name], place)
        elif of.default is MISSING:
            raise Mismatch(place)
    return kind(**found)


def _other(value: Any, key: str, due: str) -> Mismatch:
    shown = json.dumps(value, ensure_ascii=False)
    return Mismatch(key, f"is {shown if len(shown) <= 40 else f'{shown[:40]}…'}, {due} is due")


def _due(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if origin is Literal:
        return " or ".join(map(json.dumps, get_args(kind)))
    return _DUE.get(origin, "an object")


def _plain(value: object) -> Any:
    """A value as JSON holds it, or else its text without the address in memory."""
    return json.loads(json.dumps(value)) if _is_plain(value) else re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
