"""Pages about commands, made from their parsers: every key with what it takes, its default and its help."""

import argparse
import re
from argparse import Action, ArgumentParser
from collections.abc import Iterator
from importlib.metadata import entry_points
from pkgutil import resolve_name
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from jsonargparse import ActionYesNo, Namespace, capture_parser

from dualsft.cli import FLAGS, VERBS
from dualsft.commands import quickstart
from dualsft.commands.parsing import JOB, NAMED, parser_of, plain_values
from dualsft.commands.short_help import IN_OUR_WORDS

_ASKED = {"allocate": ["--help"], "export": ["apply"]}
"""Verb -> arguments without which it stops before it comes to its parser."""
_PLAIN = {NoneType: "null", bool: "true or false", int: "integer", float: "number", str: "text"}
_HEAD = "| key | takes | default | what it is |\n| --- | --- | --- | --- |"


def parser_behind(verb: str) -> ArgumentParser | None:
    """The parser of a verb's options; None for the one verb that has none."""
    if verb in JOB:
        return parser_of(verb)
    if verb in ("quickstart", "plugins"):
        return quickstart.parser() if verb == "quickstart" else None
    return capture_parser(resolve_name(f"dualsft.commands.{VERBS[verb][1]}"), _ASKED.get(verb, []))


def command_page(verb: str) -> str:
    """The page of a verb, in Markdown."""
    parser = parser_behind(verb)
    told = parser.description if parser else f"{VERBS[verb][0].capitalize()}."
    parts = [f"# dualsft {verb}", _text(told)]
    for name, form in _forms(parser).items():
        head = [f"## dualsft {verb} {name}", _text(form.description)] if name else []
        parts += [*head, *_tables(form, "###" if name else "##")]
    flags = [f"| `{flag}` | {text} |" for flag, text in FLAGS.items()]
    parts += ["Every command takes these too:", "\n".join(["| flag | what it is |\n| --- | --- |", *flags])]
    return "\n\n".join(parts) + "\n"


def _forms(parser: ArgumentParser | None) -> dict[str, ArgumentParser]:
    """The parsers of a command's forms by name; of a command without forms its own, under no name."""
    if parser is None:
        return {}
    forms = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    return forms[0] if forms else {"": parser}


def _tables(parser: ArgumentParser, heading: str) -> Iterator[str]:
    """A table for each group of options; that of Lightning's Trainer, which is long, is the last."""
    for group in sorted(parser._action_groups, key=lambda group: "Trainer" in str(group.title)):
        if rows := [_row(action) for action in group._group_actions if is_option(action)]:
            if group.title not in ("positional arguments", "options"):
                yield f"{heading} {_text(group.title)}"
            yield "\n".join(['<div class="options" markdown>\n', _HEAD, *rows, "\n</div>"])


def is_option(action: Action) -> bool:
    """Whether an action is an option by itself: neither help, nor a section, nor a link between options."""
    return action.default != argparse.SUPPRESS or action.dest == "print_config"


def key_of(action: Action) -> str:
    """How a reader writes an option: by its key in a configuration, or as it stands on a command line."""
    long = [option for option in action.option_strings if option.startswith("--") and not option.endswith("+")]
    key = long[0] if long else str(action.metavar or action.dest)
    return key.removeprefix("--") if "." in key else key


def _row(action: Action) -> str:
    told = IN_OUR_WORDS.get(action.dest, action.help)
    cells = [f"`{key_of(action)}`", _takes(action), _default(action.default), _text(told)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _takes(action: Action) -> str:
    """What values an option takes, in words."""
    if isinstance(action, ActionYesNo):
        return "true or false"
    if action.nargs == 0 or action.dest == "print_config":
        return "no value"
    if action.choices:
        return " or ".join(f"`{choice}`" for choice in action.choices)
    points = entry_points(group=NAMED.get(action.dest, "none"))
    if names := sorted(point.name for point in points if point.dist and point.dist.name == "dualsft"):
        return ", ".join(f"`{name}`" for name in names) + ", a plugin's name or a class path"
    return in_words(getattr(action, "_typehint", action.type or str))


def in_words(kind: Any) -> str:
    """A type as a reader of configurations says it: of `int | None` "integer or null"."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind in _PLAIN:
        return _PLAIN[kind]
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(in_words, parts)))
    if origin is dict:
        return "keys and values"
    if origin is not None:
        return "list" if Any in parts else f"list of {in_words(parts[0])}"
    return f"{kind.__name__} by name or class path" if isinstance(kind, type) else kind.__name__.strip("_")


def _default(value: Any) -> str:
    """A default as a configuration has it; nothing for one that is empty."""
    plain = plain_values(value)
    if plain in (None, "", argparse.SUPPRESS):
        return ""
    if isinstance(plain, str):
        return f"`{plain}`".replace("\n", "\\n")
    given = plain.as_dict() if isinstance(plain, Namespace) else plain
    return f"`{yaml.safe_dump(given, default_flow_style=True, width=10**6).removesuffix('...' + chr(10)).strip()}`"


def _text(text: str | None) -> str:
    """A help text in Markdown, on one line and without the default, which has a column."""
    line = " ".join((text or "").split())
    line = re.sub(r" \(default: %\(default\)s\)$| Default: [^ ]+$", "", line)
    line = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", line).replace("``", "`")
    pieces = line.split("`")  # every second one is code, where nothing is escaped
    return "`".join(piece if k % 2 else re.sub(r"([*_<>\[\]])", r"\\\1", piece) for k, piece in enumerate(pieces))
