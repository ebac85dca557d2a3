"""The settings of a verb as a configuration gives them, with all defaults, checked before anything runs."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import yaml

from dualsft.commands.messages import explaining_settings, quieten
from dualsft.commands.parsing import check_numbers, parser_of, prepare, replay_of
from dualsft.commands.path_options import expand_paths

_RUN = ("output_dir", "resume", "overwrite")


def resolved(verb: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Every setting of a verb but its folder's, after its classes have been made once, so that mistakes show.

    Raises:
        UserError: on a mistake in the settings.
        ArgumentError: on options that cannot be parsed.
    """
    quieten()
    parser = parser_of(verb)
    config = expand_paths(parser.parse_args(prepare(arguments, verb, parser)))
    check_numbers(config)
    with explaining_settings():
        parser.instantiate_classes(config)
    settings: dict[str, Any] = yaml.safe_load(replay_of(parser, config))
    return {key: value for key, value in settings.items() if key not in _RUN}


def as_arguments(overrides: Mapping[str, Any]) -> list[str]:
    """Settings by dotted key as the arguments of a command, in one piece each, as values may begin with a dash."""
    return [f"--{key}={_written(value)}" for key, value in overrides.items()]


def _written(value: Any) -> str:
    """A value as YAML in one line; text as it stands, as options that take text do not read it as YAML."""
    if isinstance(value, str):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False)
    return str(text).removesuffix("\n").removesuffix("\n...")


def without(settings: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Settings without these dotted keys."""
    left = deepcopy(dict(settings))
    for key in keys:
        *sections, last = key.split(".")
        place = left
        for section in sections:
            place = place.get(section) or {}
        place.pop(last, None)
    return left


def at(settings: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; None if there is none."""
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def put(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key, in place."""
    *sections, last = key.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
    settings[last] = value
