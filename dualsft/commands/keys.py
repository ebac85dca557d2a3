"""Refuses an option or a key that a verb does not know, before anything is parsed, and names the nearest it knows.

The parser would find a mistyped key of a file only after it has missed required ones, and has no advice.
"""

import re
from argparse import ArgumentError, ArgumentParser
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, get_args, get_origin

from dualsft.commands.nearest import nearest

_OPTION = re.compile(r"--[A-Za-z_][^\s]*")  # other texts that begin with hyphens are values
OfOtherVerbs = Callable[[str], list[str]]
"""Key -> the other verbs that know it."""


def check_options(
    parser: ArgumentParser, command: str, arguments: Sequence[str], of_others: OfOtherVerbs = lambda key: []
) -> None:
    """Refuse the first option on a command line that its parser does not know.

    Raises:
        ArgumentError: with the nearest option, or the commands that have it.
    """
    for argument in arguments:
        option = argument.partition("=")[0]
        if _OPTION.fullmatch(option) and not _takes(parser, option):
            key = option.removeprefix("--").removesuffix("+")
            if others := of_others(key):
                raise ArgumentError(None, f"{command} has no option {option}; it is one of {' and '.join(others)}.")
            advice = advice_on(key, keys_of(parser), "--") or f"`{command} --help` shows those it has."
            raise ArgumentError(None, f"{command} has no option {option}; {advice}")


def check_keys(
    parser: ArgumentParser,
    command: str,
    config: Mapping[str, Any],
    path: str,
    others: Callable[[], Collection[ArgumentParser]] = tuple,
) -> None:
    """Refuse the first key of a configuration, narrowed to a verb's own keys, that its parser cannot take.

    It does not know it, or it has a value where keys are due, which the parser would pass on or take for a file.

    Args:
        parser: The verb's.
        command: What the verb is called.
        config: The configuration.
        path: Its file.
        others: Gives the parsers of verbs whose keys the file may hold too, so that those are advised as well.
    """
    for key, value in _written_keys(parser, config, ""):
        if is_section(parser, key) and not isinstance(value, Mapping):
            shown = f"`{command} --print_config` shows them"
            raise ArgumentError(None, f"The configuration {path} gives {key} no keys and values of its own; {shown}.")
        if not knows(parser, key):
            known = dict.fromkeys(of for one in (parser, *others()) for of in keys_of(one))
            sections = {of.rpartition(".")[0] for of in known} - {""}
            advice = advice_on(key, [*known, *sections]) or f"`{command} --print_config` shows those there are."
            raise ArgumentError(None, f"The configuration {path} has the key {key}, which no command knows; {advice}")


def keys_of(parser: ArgumentParser) -> list[str]:
    """The keys that a parser takes a value for, those with options of their own included."""
    keys = [of for of in _destinations(parser) if not of.endswith(".help")]
    sections = {of.rpartition(".")[0] for of in keys}
    keys = [of for of in keys if of not in sections]
    return [*keys, *(["optimizer.lr", "optimizer.weight_decay"] if "optimizer" in keys else [])]


def type_of(parser: ArgumentParser, key: str) -> Any:
    """The type of a key's values; None if it has no values."""
    return next((getattr(a, "_typehint", a.type) for a in parser._actions if a.dest == key), None)


def advice_on(key: str, known: Collection[str], dashes: str = "") -> str:
    """The question whether the nearest of the known keys was meant; empty if none is near."""
    found = [f"{dashes}{of}" for of in nearest(key, known)]
    return f"did you mean {' or '.join(found)}?" if found else ""


def _takes(parser: ArgumentParser, option: str) -> bool:
    """Whether an option is known: as it is, by its beginning, or as an option of a class or the name of a set."""
    strings = parser._option_string_actions
    return (
        option in strings
        or sum(string.startswith(option) for string in strings) == 1
        or _is_inside(parser, option.removeprefix("--"))
    )


def knows(parser: ArgumentParser, key: str) -> bool:
    """Whether a key of a configuration is one of the parser's, a section of them, or inside an open one."""
    known = _destinations(parser)
    return key in known or any(of.startswith(f"{key}.") for of in known) or _is_inside(parser, key)


def _is_inside(parser: ArgumentParser, key: str) -> bool:
    """Whether a key is below one that takes a class, whose options only the class knows, or a mapping of names."""
    parts = key.split(".")
    return any(_is_open(parser, ".".join(parts[:count])) for count in range(1, len(parts)))


def _is_open(parser: ArgumentParser, key: str) -> bool:
    if f"--{key}.help" in parser._option_string_actions:
        return True
    kind = type_of(parser, key)
    return dict in {get_origin(part) or part for part in (kind, *get_args(kind))}


def _written_keys(parser: ArgumentParser, config: Mapping[str, Any], section: str) -> list[tuple[str, Any]]:
    """The keys of a configuration with their sections, down to those that take a value, a class or a mapping."""
    keys: list[tuple[str, Any]] = []
    for name, value in config.items():
        key = f"{section}{name}"
        inner = isinstance(value, Mapping) and value and is_section(parser, key)
        keys += _written_keys(parser, value, f"{key}.") if inner else [(key, value)]
    return keys


def is_section(parser: ArgumentParser, key: str) -> bool:
    """Whether a key has no value, but keys of its own that the parser knows."""
    return any(of.startswith(f"{key}.") for of in _destinations(parser)) and not _is_open(parser, key)


def _destinations(parser: ArgumentParser) -> list[str]:
    return [action.dest for action in parser._actions]
