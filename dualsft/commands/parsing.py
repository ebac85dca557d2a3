"""Prepares arguments for jsonargparse, which knows neither shared configurations nor registered names.

One configuration file describes a job, so each verb takes its own keys from it and skips those of other verbs. A key
that no verb knows is an error. Wherever a class path is expected, a registered name may be given in its place.
"""

import inspect
import json
import os
import re
from collections.abc import Sequence
from enum import Enum
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml
from jsonargparse import ActionYesNo, ArgumentParser, Namespace, capture_parser

from dualsft.commands.keys import check_keys, check_options, knows
from dualsft.commands.values import with_plain_values, written_plainly
from dualsft.errors import UserError
from dualsft.registry import class_path
from dualsft.storage.paths import expanded

NAMED = {
    "model.scorer": "dualsft.scorers",
    "model.path.along": "dualsft.paths",
    "model.parameter_allocator": "dualsft.parameter_allocators",
    "model.data_allocator": "dualsft.data_allocators",
}
"""Option -> the group in which the names that it takes are registered."""
JOB = {verb: f"dualsft.commands.{verb}:{verb.capitalize()}CLI" for verb in ("select", "fit", "validate", "audit")}
"""The verbs whose keys one configuration may hold; each one's module is imported only if a key is looked for in it."""
MOVED = {"dualsft.distributed.strategy.FSDP2": "dualsft.sharding.strategy.FSDP2"}
"""Class path that configurations may give from before its module moved -> the one it has now."""
CONFIG = ("--config", "-c")
SET_ELSEWHERE = {
    "data.selection": "model.selection (of fit)",
    "data.tokenizer": "model.model_name_or_path",
    "data.seed": "seed_everything",
}
_SECTIONS = ("model", "data")
_ADD_UP = "--tasks"
_INTEGERS = 2**63


def add_folder_options(parser: ArgumentParser, resumable: bool) -> None:
    """Add the options about a run's output folder."""
    parser.add_argument("--output_dir", type=str, default="", help="Folder that the results are written to.")
    flag: Any = {"action": ActionYesNo, "default": False}
    if resumable:
        parser.add_argument("--resume", **flag, help="Go on from what a killed run left in --output_dir.")
    parser.add_argument("--overwrite", **flag, help="Replace the run that --output_dir holds.")


def add_experiment_options(parser: ArgumentParser) -> None:
    """Add the options about the jobs of an experiment."""
    bank = "Folder of finished runs, which several experiments may share; null for one in --output_dir."
    parser.add_argument("--bank", type=str | None, default=None, help=bank)
    parallel = "Runs at a time; null for one on each accelerator."
    parser.add_argument("--parallel", type=int | None, default=None, help=parallel)
    dry = "Say what would be run and how long it takes, and run nothing."
    parser.add_argument("--dry_run", action=ActionYesNo, default=False, help=dry)


def check_output_dir(config: Namespace) -> None:
    """Refuse to run without an output folder."""
    if not config.output_dir:
        raise UserError("--output_dir is not given; name the folder that the results are to be written to.")


def check_numbers(value: Any, key: str = "") -> None:
    """Refuse an integer anywhere in a parsed configuration that 64 bits do not hold: computing with it would fail."""
    if isinstance(value, int) and not -_INTEGERS <= value < _INTEGERS:
        raise UserError(f"{key} is an integer beyond {_INTEGERS:.0e}, which no run takes; give a smaller one.")
    inner = vars(value) if isinstance(value, Namespace) else value
    parts = inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ()
    for name, part in parts:
        check_numbers(part, f"{key}.{name}".removeprefix("."))


def replay_of(parser: ArgumentParser, config: Namespace) -> str:
    """The YAML that replays a run: its settings without --resume and --overwrite."""
    once = {key: False for key in ("resume", "overwrite") if key in config}
    return parser.dump(Namespace(**{**vars(plain_values(config)), **once}), skip_none=False)


def plain_values(value: Any) -> Any:
    """A parsed configuration with enumerations (in defaults) replaced by their values, which YAML can hold.

    Empty ``init_args``, which the parser leaves where a name overrides a class with options, are left out, as is the
    path that it notes in a section whose keys a file on the command line gave.
    """
    if isinstance(value, Namespace):
        parts = {key: plain_values(part) for key, part in vars(value).items() if key != "__path__"}
        return Namespace(**{key: part for key, part in parts.items() if (key, part) != ("init_args", Namespace())})
    if isinstance(value, list):
        return [plain_values(part) for part in value]
    return value.value if isinstance(value, Enum) else value


def prepare(arguments: Sequence[str], verb: str, parser: ArgumentParser) -> list[str]:
    """Prepare a verb's arguments: narrow configuration files to its keys, and replace names by class paths."""
    prepared: list[str] = []
    command = f"dualsft {verb}"
    split = _added_up([part for a in arguments for part in _split(_moved(a))])
    for option in split:
        if option.startswith("--"):
            _check_place(option.removeprefix("--").split("=")[0])
    check_options(parser, command, split, partial(_who_knows, _others(verb)))
    for key, value in zip(["", *split], split, strict=False):
        if key in CONFIG:
            narrowed = _narrow(_read_config(value), verb, parser)
            check_keys(parser, command, narrowed, value, lambda: [parser_of(other) for other in _others(verb)])
            prepared.append(yaml.safe_dump(with_plain_values(parser, narrowed), sort_keys=False))
        elif value == "--print_config":
            prepared.append("--print_config=comments")
        else:
            prepared.append(_expand_option(key, _plain_value(parser, key, value)))
            if key.endswith(".help") and _group(key):
                found = resolve_name(prepared[-1])
                if not inspect.signature(found).parameters:  # the parser prints no help for a class without options
                    print(f"{inspect.getdoc(found)}\n\nIt has no options.\n")
    return prepared


def _plain_value(parser: ArgumentParser, option: str, argument: str) -> str:
    """An argument, with the value in it or after ``option`` as the parser takes it."""
    own, equals, value = argument.partition("=")
    if equals and own.startswith("--"):
        return f"{own}={written_plainly(parser, own, value)}"
    return written_plainly(parser, option, argument) if option.startswith("--") else argument


def _moved(text: str) -> str:
    """Replace class paths of modules that have moved since by today's."""
    return re.sub(r"\b\w++(\.\w++)+", lambda path: MOVED.get(path[0], path[0]), text)


def _added_up(arguments: list[str]) -> list[str]:
    """Rewrite ``--tasks`` as ``--tasks+`` from its second occurrence on.

    So the first replaces the tasks of a configuration, and the others add to it.
    """
    before = accumulate(arguments, lambda seen, argument: seen or argument == _ADD_UP, initial=False)
    return [f"{a}+" if a == _ADD_UP and again else a for a, again in zip(arguments, before, strict=False)]


def _check_place(key: str) -> None:
    if key in SET_ELSEWHERE:
        raise UserError(f"{key} is not set by itself; it follows {SET_ELSEWHERE[key]}: set that.")


def _split(argument: str) -> list[str]:
    option, equals, value = argument.partition("=")
    ours = option in (*CONFIG, _ADD_UP) or (option.startswith("--") and bool(_group(option)))
    return [option, value] if equals and ours else [argument]


def _group(option: str) -> str:
    key = option.removeprefix("--").removesuffix(".help").removesuffix(".class_path")
    return NAMED.get(key, "")


def class_given(arguments: Sequence[str], key: str) -> str | None:
    """The class path that prepared arguments give last for a key; None if they give none."""
    section, _, name = key.partition(".")
    found = None
    for option, value in zip(["", *arguments], arguments, strict=False):
        given: Any = None
        if option in (f"--{key}", f"--{key}.class_path"):
            given = _loaded(value)
        elif option in CONFIG:
            config = _loaded(value)
            given = config.get(key, (config.get(section) or {}).get(name)) if isinstance(config, dict) else None
        found = (given.get("class_path") if isinstance(given, dict) else given) or found
    return found


def _expand_option(option: str, value: str) -> str:
    group = _group(option) if option.startswith("--") else ""
    if not group or value in ("null", "None") or value.startswith("--"):
        return value
    if re.fullmatch(r"[\w-]+", value):
        return class_path(group, value)
    inline = value.lstrip().startswith("{")
    file = os.path.expandvars(os.path.expanduser(value))
    if inline or os.path.isfile(file):
        given = _loaded(value if inline else Path(file).read_text(encoding="utf-8"))
        return json.dumps(_expand_value(group, given)) if isinstance(given, dict) else value
    return class_path(group, value) if re.fullmatch(r"[\w.]+", value) else value


def _loaded(text: str) -> Any:
    """The value of a YAML text; the text itself if it is not YAML, so that the parser reports the error."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def _read_config(path: str) -> dict[str, Any]:
    """A YAML configuration, which must be a mapping."""
    try:
        loaded = yaml.safe_load(_moved(Path(expanded(path)).read_text(encoding="utf-8")))
        json.dumps(loaded, default=str, skipkeys=True)  # refuses an alias that holds itself
    except OSError as error:
        raise UserError(f"The configuration {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # impossible dates, endless digits, deep nesting
        raise UserError(f"The configuration {path} is not YAML: {' '.join(str(error).split())}.") from error
    loaded = {} if loaded is None else loaded
    if not isinstance(loaded, dict):
        raise UserError(f"The configuration {path} holds a {type(loaded).__name__}, not keys and values.")
    for section in _SECTIONS:
        if not isinstance(loaded.get(section, {}), dict):
            raise UserError(f"The configuration {path} gives {section} no keys and values of its own.")
    return loaded


def _narrow(config: dict[str, Any], verb: str, parser: ArgumentParser) -> dict[str, Any]:
    """A configuration without the keys of other verbs only; keys that no verb knows stay, for the parser to refuse."""

    def belongs(key: str) -> bool:
        return _knows(parser, key) or not any(_knows(parser_of(other), key) for other in _others(verb))

    narrowed: dict[str, Any] = {}
    for key, value in config.items():
        if key in _SECTIONS and isinstance(value, dict):
            for name, given in value.items():
                if given is not None:
                    _check_place(f"{key}.{name}")
            narrowed[key] = {k: v for k, v in value.items() if belongs(f"{key}.{k}")}
        elif belongs(key):
            narrowed[key] = value
    for key, group in NAMED.items():
        _expand_at(narrowed, key, group)
    return narrowed


def _expand_at(place: dict[str, Any], key: str, group: str) -> None:
    """Replace a name in a configuration by its class path, whether the key is written with dots or as sections."""
    if key in place:
        place[key] = _expand_value(group, place[key])
    for count in range(1, len(parts := key.split("."))):
        section = ".".join(parts[:count])
        if isinstance(inner := place.get(section), dict):
            place[section] = inner = dict(inner)
            _expand_at(inner, ".".join(parts[count:]), group)


def _expand_value(group: str, value: Any) -> Any:
    if isinstance(value, str):
        return {"class_path": class_path(group, value)}
    if isinstance(value, dict) and isinstance(value.get("class_path"), str):
        return {**value, "class_path": class_path(group, value["class_path"])}
    return value


def _others(verb: str) -> list[str]:
    return [other for other in JOB if other != verb]


def _who_knows(verbs: Sequence[str], key: str) -> list[str]:
    return [verb for verb in verbs if knows(parser_of(verb), key)]


def _knows(parser: ArgumentParser, key: str) -> bool:
    return any(a.dest == key or a.dest.startswith(f"{key}.") for a in parser._actions)


@cache
def parser_of(verb: str) -> ArgumentParser:
    """The parser of a verb's options; nothing is parsed or run."""
    return capture_parser(resolve_name(JOB[verb]), [])
