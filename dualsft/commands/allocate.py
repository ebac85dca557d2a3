"""`dualsft allocate`: another choice from the scores of a finished selection, in seconds and without a model."""

import argparse
import inspect
from collections.abc import Sequence
from dataclasses import is_dataclass
from pkgutil import resolve_name
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from dualsft.commands.messages import explaining_settings
from dualsft.commands.parsing import CONFIG, add_folder_options, check_output_dir, class_given, prepare, replay_of
from dualsft.commands.path_options import expand_paths
from dualsft.data.module import InstructionDataModule
from dualsft.data.records import read_records
from dualsft.errors import UserError
from dualsft.selection import load_selection
from dualsft.selection.json_values import Part, describe_part
from dualsft.selection.manifest import Manifest
from dualsft.selection.reallocation import reallocate
from dualsft.selection.settings import CHOICE, SelectionSettings
from dualsft.selection.summary import summary

TAKEN: dict[str, tuple[str, type, tuple[str, ...]]] = {
    "model": ("The choice", SelectionSettings, CHOICE),
    "data": ("The records that the selection was made from", InstructionDataModule, ("train", "train_split")),
}
"""Section -> its title, whose options it has, and which of them."""
DESCRIPTION = (
    "Makes another selection from the stored scores of a finished one, with other budgets or allocators. Whatever is "
    "not given stays as it was in SELECTION."
)


def allocate_command(arguments: Sequence[str]) -> None:
    """Allocate, and print the choice; SELECTION is the first argument, unless a configuration names it."""
    config, replay = _parse(arguments)
    check_output_dir(config)
    try:
        made = reallocate(
            config.selection,
            config.output_dir,
            train=config.data.train,
            train_split=config.data.train_split,
            overwrite=config.overwrite,
            config=replay,
            **vars(config.model),
        )
    except KeyboardInterrupt as stop:
        raise UserError("The allocation was interrupted and left nothing behind; run it again.") from stop
    train = made.about.data.train
    print(summary(made, records=read_records(train.path, train.split)))


def _parse(arguments: Sequence[str]) -> tuple[Namespace, str]:
    """Parse the settings; return them with the allocators made, and the YAML that replays them."""
    parser = _parser()
    if arguments and not arguments[0].startswith("-"):
        named, rest = ["--selection", arguments[0]], arguments[1:]
        # last, to override a configuration; but what follows a help option would be read as an option of its class
        arguments = [*named, *rest] if _asks_for_help(rest) else [*rest, *named]
    arguments = prepare(arguments, "allocate", parser)
    selection = _selection(arguments)
    lost: list[str] = []
    if selection is not None:
        lost = _stay_as_they_were(parser, load_selection(selection).about, arguments)
    elif _asks_for_help(arguments):
        kept = [key for key, _ in parser.get_defaults().items() if key.partition(".")[0] in TAKEN]
        parser.set_defaults(dict.fromkeys(kept, "as in SELECTION"))
    else:
        raise UserError("The selection is not given; name it first: `dualsft allocate SELECTION --output_dir DIR`.")
    config = expand_paths(parser.parse_args(arguments))
    for key in lost:
        if config[key] is None:
            raise UserError(f"The {key} of {selection} cannot be made again from its manifest; give --{key}.")
    replay = replay_of(parser, config)
    with explaining_settings():
        return parser.instantiate_classes(config), replay


def _parser() -> ArgumentParser:
    """Build the parser; options that `select` has too have the same type and help."""
    usage = "dualsft allocate SELECTION --output_dir DIR [options]"
    parser = ArgumentParser(prog="dualsft allocate", usage=usage, description=DESCRIPTION, exit_on_error=False)
    parser.add_argument("-c", *CONFIG[:1], action="config", help="Path to a configuration file in yaml format.")
    parser.add_argument(
        "--selection", type=str, default=None, help="Folder of the finished selection; SELECTION, given first, is it."
    )
    add_folder_options(parser, resumable=False)
    for section, (title, kind, taken) in TAKEN.items():
        others = set(inspect.signature(kind).parameters) - set(taken)
        parser.add_class_arguments(kind, section, skip=others, sub_configs=True, instantiate=False)
        assert parser.groups is not None
        parser.groups[section].title = title  # the class's own title describes `select`
    return parser


def _selection(arguments: Sequence[str]) -> str | None:
    """The selection named on the command line, otherwise by the last configuration that names one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--selection")
    parser.add_argument(*CONFIG, dest="configs", action="append", default=[])
    known, _ = parser.parse_known_args(arguments)
    named = [yaml.safe_load(text).get("selection") for text in known.configs]
    return known.selection or next((name for name in reversed(named) if isinstance(name, str)), None)


def _asks_for_help(arguments: Sequence[str]) -> bool:
    return any(a == "-h" or a.endswith("help") for a in arguments)


def _stay_as_they_were(parser: ArgumentParser, manifest: Manifest, arguments: Sequence[str]) -> list[str]:
    """Make the selection's settings the options' defaults; return the keys for which that is impossible.

    An allocator's stored options are defaults only for the same allocator: another one has its own.
    """
    train, lost = manifest.data.train, []
    defaults: dict[str, Any] = {"data.train": train.path, "data.train_split": train.split}
    for name in CHOICE:
        key, stored = f"model.{name}", manifest.settings[name]
        if not isinstance(stored, Part):
            fields = vars(stored) if is_dataclass(stored) else {}
            defaults |= {f"{key}.{field}": value for field, value in fields.items()} or {key: stored}
            continue
        try:
            given = class_given(arguments, key)
            if not given or resolve_name(given) is resolve_name(stored.class_path):
                defaults[key] = _setting_of(name, stored)
        except Exception:  # its package may be gone, or `_setting_of` fails
            lost.append(key)
    parser.set_defaults(defaults)
    return lost


def _setting_of(name: str, stored: Part) -> dict[str, Any]:
    """The setting from which the parser makes the allocator that a manifest describes.

    Raises:
        ValueError: if it makes another one, because the allocator stores its options under other names.
    """
    taken = inspect.signature(resolve_name(stored.class_path)).parameters
    options = {key: value for key, value in stored.options.items() if key in taken}
    setting = {"class_path": stored.class_path, "init_args": options}
    (probe := _parser()).set_defaults({f"model.{name}": setting})
    made = probe.instantiate_classes(probe.parse_args([])).model[name]
    if Part(**describe_part(made)) != stored:
        raise ValueError(f"{stored.class_path} is another one when made again")
    return setting
