"""The directories that a report is made of: what kind each is, and by which name the page calls it."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dualsft.errors import UserError
from dualsft.storage.paths import expanded

Kind = Literal["selection", "fit", "evaluation", "audit", "comparison"]

_MARKS: dict[Kind, tuple[str, ...]] = {
    "selection": ("manifest.json",),
    "audit": ("audit.json",),
    "comparison": ("table.md", "layers.md"),
}
"""Kind -> the files of which one tells it."""
_METRICS = "metrics.json"


@dataclass(frozen=True)
class Source:
    """A directory of results.

    Attributes:
        folder: The directory.
        name: What the page calls it: the end of its path that tells it from the others.
        kind: Which command wrote it.
    """

    folder: Path
    name: str
    kind: Kind


def find_sources(folders: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """Recognise directories; each is taken once.

    Raises:
        UserError: if one is none, or is of no kind that a report shows.
    """
    found = list(dict.fromkeys(Path(os.path.abspath(expanded(os.fspath(folder)))) for folder in folders))
    kinds = [_kind(folder) for folder in found]
    return [Source(*parts) for parts in zip(found, _names(found), kinds, strict=True)]


def _kind(folder: Path) -> Kind:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory; name those that select, fit, validate, audit or compare wrote.")
    for kind, marks in _MARKS.items():
        if any((folder / mark).is_file() for mark in marks):
            return kind
    if (folder / _METRICS).is_file() and (measured := _measured(folder / _METRICS)) is not None:
        return measured
    raise UserError(
        f"{folder} holds no finished selection, fit, evaluation, audit or comparison (manifest.json, metrics.json, "
        "audit.json or table.md); name a directory that one of these commands has written."
    )


def _measured(path: Path) -> Kind | None:
    """The command whose figures a file holds: those of an evaluation are metrics alone."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); make that run again.") from error
    if not isinstance(found, dict):
        return None
    return "evaluation" if all(type(value) in (int, float) for value in found.values()) else "fit"


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other."""
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
