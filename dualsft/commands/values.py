"""Values as people write them, and as the parser takes them: percentages, short names of types, one text for a list."""

import json
import os
import re
from argparse import ArgumentParser
from collections.abc import Mapping
from typing import Any, get_args, get_origin

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
    if not isinstance(value, str):
        return value
    kinds = {get_origin(part) or part for part in (kind, *get_args(kind))}
    if float in kinds and (percent := _PERCENT.fullmatch(value)):
        return float(percent[1]) / 100
    if list in kinds and str not in kinds and _is_one_text(kind, value):
        return [value]
    return SHORT.get(key, {}).get(value.lower(), value)


def _is_one_text(kind: Any, value: str) -> bool:
    """Whether a value for a list of texts is a single one of them, and no list, null or file with a list."""
    lists = [part for part in (kind, *get_args(kind)) if (get_origin(part) or part) is list]
    texts = any(get_args(part) == (str,) for part in lists)
    return texts and not value.lstrip().startswith("[") and value not in ("null", "None") and not os.path.isfile(value)
