"""What ``data.train`` and ``data.validation`` may name: one source, several end to end, or sources by name.

A source is a path, a glob or a hub id, or a mapping that has one as ``path`` beside options of its own. A mapping
without ``path`` names sources, each of which may be a list. The records of all are one sequence, in the order given.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from dualsft.data.folders import listed
from dualsft.data.options import FormatOptions, check_name
from dualsft.errors import UserError, naming

Given = str | dict[str, Any] | list[Any]
"""What an option gives: a path, a mapping of names, or of a path and its options, or a list of paths and such."""
READING = tuple(of.name for of in fields(FormatOptions))
_SAMPLING = ("share", "cap", "seed")
_OPTIONS = ("path", "split", *READING, *_SAMPLING)


@dataclass(frozen=True)
class SourceOptions:
    """One source of a pool or of a validation set.

    Attributes:
        path: A file, a folder, a glob or the id of a Hugging Face dataset.
        name: Its name in a mapping; empty where it has none.
        split: The split to read, if not that of ``data.train_split`` or ``data.validation_split``.
        reading: What it says itself of format and columns: fields of `FormatOptions`.
        share: Share of its records that is taken, drawn at random.
        cap: The most records that are taken, drawn at random.
        seed: Decides which records are drawn; no other seed does, so that a pool is the same in every run.
    """

    path: str
    name: str = ""
    split: str | None = None
    reading: Mapping[str, Any] = field(default_factory=dict)
    share: float | None = None
    cap: int | None = None
    seed: int = 0

    @property
    def is_sampled(self) -> bool:
        """Whether only a part of its records may be taken."""
        return self.share is not None or self.cap is not None


def sources_of(given: Given, key: str, samples: bool = True) -> tuple[SourceOptions, ...]:
    """The sources that are given, in their order.

    Args:
        given: One source, a list of them, or a mapping of names to sources and lists.
        key: The option that gives them, for messages.
        samples: Whether a source may have a share or a cap.

    Raises:
        UserError: If it is none of these, or an option of a source is unknown or out of range.
    """
    if isinstance(given, Mapping) and "path" not in given:
        if not given:
            raise UserError(f"{key} is an empty mapping: give a source, or names with a source each.")
        for name in given:
            check_name(key, "source", name)
        parts = [(f"{key}.{name}", name, one) for name, one in given.items()]
        return tuple(source for place, name, part in parts for source in _several(part, place, name, samples))
    return tuple(_several(given, key, "", samples))


def _several(given: Any, key: str, name: str, samples: bool) -> Iterator[SourceOptions]:
    if not isinstance(given, list):
        yield _one(given, key, name, samples)
        return
    if not given:
        raise UserError(f"{key} is an empty list: give at least one source.")
    for number, one in enumerate(given):
        yield _one(one, f"{key}[{number}]", name, samples)


def _one(given: Any, key: str, name: str, samples: bool) -> SourceOptions:
    if isinstance(given, str):
        return SourceOptions(given, name)
    if not isinstance(given, Mapping):
        raise UserError(f"{key} is {given!r}: give a path, or a mapping that has one as path.")
    for option, value in given.items():
        _check(key, option, value, samples)
    if "path" not in given:
        raise UserError(f"{key} has no path: name the file, the folder or the dataset that is read.")
    reading = {option: given[option] for option in READING if given.get(option) is not None}
    with naming(key):
        FormatOptions().within(reading)
    others = {option: given[option] for option in ("split", *_SAMPLING) if given.get(option) is not None}
    return SourceOptions(given["path"], name, reading=reading, **others)


def _check(key: str, option: Any, value: Any, samples: bool) -> None:
    """Refuse an option that a source does not have, and a value that it cannot have."""
    if option not in _OPTIONS:
        near = get_close_matches(str(option), _OPTIONS, 1)
        meant = f", perhaps {near[0]}" if near else ""
        raise UserError(f"{key} has no option {option!r}{meant}: a source has {', '.join(_OPTIONS)}.")
    if option in _SAMPLING and not samples:
        raise UserError(f"{key}.{option} is for data.train alone: a validation set is read whole; leave it out.")
    if option == "path" or (value is not None and option not in _SAMPLING):
        if not isinstance(value, str):
            raise UserError(f"{key}.{option} is {value!r}, which is not text; put it in quotes.")
    elif value is not None and not _in_range(option, value):
        due = {
            "share": "a share above 0 and up to 1, such as 0.1",
            "cap": "a count of at least 1",
            "seed": "a count of at least 0",
        }
        raise UserError(f"{key}.{option} is {value!r}; give {due[option]}.")


def _in_range(option: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value <= 1 if option == "share" else isinstance(value, int) and value >= (option == "cap")


def with_paths(given: Any, change: Callable[[str, str], str], key: str = "") -> Any:
    """What is given with every path in it changed; what is neither a path nor holds one stays as it is.

    Args:
        given: The sources.
        change: Makes of the option that gives a path, and the path, another one.
        key: The option that gives the sources.
    """
    if isinstance(given, str):
        return change(key, given)
    if isinstance(given, list):
        return [with_paths(one, change, f"{key}[{number}]") for number, one in enumerate(given)]
    if isinstance(given, Mapping):
        held = {"path"} & given.keys() or given.keys()
        return {of: with_paths(one, change, f"{key}.{of}") if of in held else one for of, one in given.items()}
    return given


def paths_of(given: Any) -> list[str]:
    """Every path that is given, in order; none for None."""
    found: list[str] = []

    def note(key: str, path: str) -> str:
        found.append(path)
        return path

    with_paths(given, note)
    return found


def described(given: Any) -> str:
    """The sources in a few words: their names with the paths, or the paths alone."""
    if isinstance(given, Mapping) and "path" not in given:
        return ", ".join(f"{name} ({listed(paths_of(one))})" for name, one in given.items())
    return listed(paths_of(given))
