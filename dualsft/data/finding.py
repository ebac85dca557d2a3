"""A path -> the files behind it: a file, a folder of files, a glob or a Hugging Face dataset."""

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dualsft.data.files import KINDS, READERS, SourceLine, kind_of, reader_of, table_lines
from dualsft.data.folders import files_of, listed
from dualsft.data.tables import is_saved_to_disk, saved_records
from dualsft.errors import UserError, first_line
from dualsft.storage.hub import OFFLINE, cache_alone_when_offline
from dualsft.storage.paths import expanded, named

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PART_OF_SPLIT = re.compile(r"\[|\+")
_EXTENSION = re.compile(r"\.[A-Za-z]\w*$")
_SOURCES = f"a {KINDS} file, a folder of them, a glob or a Hugging Face dataset id"


class SourceFile(NamedTuple):
    """A file or a dataset that has been found, and not yet read.

    Attributes:
        lines: Its records.
        match: What a glob matched to find it; empty where none did.
    """

    lines: Iterator[SourceLine]
    match: str = ""


class FoundSource(NamedTuple):
    """The files behind a path.

    Attributes:
        files: Those that are read.
        left_out: Names of what lies in the folder beside the files that are read.
    """

    files: tuple[SourceFile, ...]
    left_out: tuple[str, ...] = ()


def find_source(path: str, split: str) -> FoundSource:
    """Finds a file, a folder of files, what a glob matches or, where there is nothing, a Hugging Face dataset.

    Of a folder with several splits the files of ``split`` are read, by name. What exists under the path as it is
    written is no glob.

    Raises:
        UserError: If there is nothing to read at ``path``; iteration raises it for what cannot be read.
    """
    if not path:
        raise UserError(f"The source is an empty text: give {_SOURCES}.")
    full = expanded(path)
    try:
        if (place := Path(full)).is_dir() or place.exists():
            return _found(place, split)
        if glob.has_magic(full):
            return _matches(full, split)
    except OSError as error:
        raise UserError(f"{named(error.filename or place)} cannot be read ({error.strerror}).") from error
    if _HUB_ID.fullmatch(path) and not _EXTENSION.search(path):
        return FoundSource((SourceFile(_hub_lines(path, split)),))
    raise UserError(f"{named(path)} does not exist: give {_SOURCES}.")


def _matches(pattern: str, split: str) -> FoundSource:
    """All that a glob matches, by name; ``**`` stands for any number of folders."""
    if not (matches := sorted(glob.glob(pattern, recursive=True))):
        raise UserError(f"{named(pattern)} matches no file: mend the pattern, or give {_SOURCES}.")
    found = {match: _found(Path(match), split) for match in matches}
    files = (file._replace(match=match) for match, one in found.items() for file in one.files)
    return FoundSource(tuple(files), tuple(name for one in found.values() for name in one.left_out))


def _found(place: Path, split: str) -> FoundSource:
    if part := _PART_OF_SPLIT.search(split):
        raise UserError(
            f"{named(place)} is read whole, so that {split!r} says nothing: {part[0]!r} is for splits of Hugging "
            "Face datasets; write the rows to be read to a file."
        )
    return _folder(place, split) if place.is_dir() else FoundSource((SourceFile(reader_of(place)(place)),))


def _folder(folder: Path, split: str) -> FoundSource:
    if is_saved_to_disk(folder):
        return FoundSource((SourceFile(table_lines(saved_records(folder, split), folder.name)),))
    files, left_out = files_of(folder, split, lambda file: kind_of(file) in READERS)
    if not files:
        others = f", but {listed(left_out)}" if left_out else ""
        raise UserError(f"The folder {named(folder)} holds no {KINDS} file{others}.")
    return FoundSource(tuple(SourceFile(reader_of(file)(file)) for file in files), left_out)


def _hub_lines(name: str, split: str) -> Iterator[SourceLine]:
    import datasets  # takes most of a second

    with cache_alone_when_offline() as offline:
        try:
            records = datasets.load_dataset(name, split=split)
        except Exception as error:  # the hub's client raises many kinds, none of them worded for users
            raise UserError(
                f"{name} is neither a file or folder here nor a Hugging Face dataset that can be loaded "
                f"(split {split!r}): {OFFLINE if offline else first_line(error)}"
            ) from error
    yield from table_lines(records, f"{name} [{split}]")
