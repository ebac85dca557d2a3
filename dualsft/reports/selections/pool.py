"""The pool that a selection was made from, found from any working directory."""

from collections.abc import Iterator
from contextlib import chdir
from glob import glob
from pathlib import Path
from typing import NamedTuple

from dualsft.data.records import Records, read_records
from dualsft.data.sources import paths_of
from dualsft.errors import UserError
from dualsft.selection import Selection


class Pool(NamedTuple):
    """The records of a pool, or why they are not at hand.

    Attributes:
        records: The records; None where they are not at hand.
        lack: Why not.
        directory: The directory from which the selection's relative paths lead to its inputs, as far as is known.
    """

    records: Records | None
    lack: str
    directory: Path


def find_pool(selection: Selection) -> Pool:
    """Read the records that a selection was made from, if they are as they were.

    Relative paths are looked up in the working directory, in that of the selection's run, and in the folders that the
    selection lies in, so that a project that was moved as a whole is found too.
    """
    train, here = selection.about.data.train, Path.cwd()
    lacks = []
    for directory in _directories(selection, here):
        with chdir(directory):
            try:
                records = read_records(train.path, train.split)
            except UserError as error:
                lacks.append(str(error))
                continue
        if records.fingerprint == train.fingerprint:
            return Pool(records, "", directory)
        lacks.append(f"{train.path} has changed since")
    return Pool(None, f"{lacks[0].rstrip('.')}{_advice(selection)}", here)


def _directories(selection: Selection, here: Path) -> Iterator[Path]:
    """The working directory, and others in which something lies where a relative path leads."""
    yield here
    relative = [path for path in paths_of(selection.about.data.train.path) if not Path(path).is_absolute()]
    made_in = [Path(selection.about.directory)] if selection.about.directory else []
    for directory in dict.fromkeys([*made_in, *selection.folder.absolute().parents]):
        if directory != here and any((directory / path).exists() or glob(str(directory / path)) for path in relative):
            yield directory


def _advice(selection: Selection) -> str:
    """What to do about a path that depends on the working directory."""
    if all(Path(path).is_absolute() for path in paths_of(selection.about.data.train.path)):
        return ""
    where = selection.about.directory or "the directory that the selection was made in"
    return f" (a relative path, of {where}; run report there if the pool still is)"
