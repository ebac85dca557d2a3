"""Values as people write them, and as the parser takes them: percentages, short names of types, one text for a list."""

import json
import os
import re
from argparse import ArgumentParser
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from dualsft.commands.keys import is_section, type_of

_TYPES = {"bf16": "bfloat16", "fp32": "float32", "float": "float32", "fp64": "float64", "double": "float64"}
_PRECISIONS = {"fp32": "32-true", "float32": "32-true", "fp64": "64-true", "fp16": "16-mixed", "bfloat16": "bf16"}
SHORT = {"model.dtype": _TYPES, "trainer.precision": _PRECISIONS}
"""Key -> its values by other names."""
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*%\s*")


def written_plainly(parser: ArgumentParser, option: str, value: str) -> str:
    """The value of an option on the command line, as the parser takes it."""
    key = option.removeprefix("--")
    found = _as_taken(type_of(parser, key), key, value)
    return found if isinstance(found, str) else json.dumps(found)


def with_plain_values(parser: ArgumentParser, config: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """A configuration with every value as the parser takes it."""
    plain: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{section}{name}"
        if isinstance(value, Mapping) and is_section(parser, key):
            plain[name] = with_plain_values(parser, value, f"{key}.")
        else:
            plain[name] = _as_taken(type_of(parser, key), key, value)
    return plain


def _as_taken(kind: Any, key: str, value: Any) -> Any:
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    item = _item_of([member for member in members if member is not NoneType])
    if item is not None and _is_single(value):
        return [value if item is str or not isinstance(value, str) else yaml.safe_load(value)]
    if not isinstance(value, str):
        return value
    if float in members and (percent := _PERCENT.fullmatch(value)):
        return float(percent[1]) / 100
    return SHORT.get(key, {}).get(value.lower(), value)


def _item_of(members: list[Any]) -> Any:
    """The type of a list's items, `str` for names of a choice; None if another value is taken too, or other items."""
    if [get_origin(member) for member in members] != [list]:
        return None
    (item,) = get_args(members[0])
    return str if get_origin(item) is Literal else item if item in (str, int, float) else None


def _is_single(value: Any) -> bool:
    """Whether a value is a single item of a list, and no list, null or file with a list."""
    if not isinstance(value, str):
        return isinstance(value, (int, float))
    return not value.lstrip().startswith("[") and value not in ("null", "None") and not os.path.isfile(value)
