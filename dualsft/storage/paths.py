"""What a path means, the same for every option: its shorthands written out, what no system takes refused."""

import errno
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from dualsft.errors import UserError

_LONGEST_PART, _LONGEST, _SHOWN = 255, 4000, 120
_UNSET = re.compile(r"\$(\w+|\{[^}]*\})")


def expanded(path: str) -> str:
    """A path with ``~`` and environment variables written out; hub ids and other paths stay as they are.

    Raises:
        UserError: If it names a variable that is not set or a user that does not exist, or is longer, or of other
            characters, than file systems take.
    """
    if path.startswith("~") or "$" in path:
        path = _written_out(path)
    if "\0" in path:
        raise UserError(f"The path {named(path)} holds a NUL character, which no file system takes.")
    try:
        raw = path.encode()
        os.fsencode(path)
    except UnicodeEncodeError as error:
        spoken = sys.getfilesystemencoding()
        advice = "rename it" if spoken == "utf-8" else f"this locale's encoding is {spoken}: set PYTHONUTF8=1"
        raise UserError(f"The path {named(path)} is not {error.encoding.upper()}; {advice}.") from error
    if (longest := max(map(len, raw.split(b"/")))) > _LONGEST_PART:
        raise UserError(
            f"The path {named(path)} has a part of {longest:,} bytes, where file systems take {_LONGEST_PART}; give a "
            "shorter one."
        )
    if len(raw) > _LONGEST:
        raise UserError(f"The path {named(path)} has {len(raw):,} bytes, where systems take {_LONGEST}; shorten it.")
    return path


def _written_out(path: str) -> str:
    full = os.path.expandvars(os.path.expanduser(path))
    if os.path.lexists(full):
        return full
    if unset := _UNSET.search(full):
        raise UserError(f"The path {named(path)} names {unset[0]}, an environment variable that is not set; set it.")
    if full.startswith("~"):
        raise UserError(f"The path {named(path)} names the home folder of a user that this machine does not know.")
    return full


def real(path: Path) -> Path:
    """The path without links; of links that lead in a circle, which cannot be followed, as far as they can."""
    return Path(os.path.realpath(path))


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; copy it where there are no hard links, or the name is on another file system."""
    try:
        os.link(real(source), target)
    except OSError:
        shutil.copyfile(source, target)


def named(path: str | os.PathLike[str]) -> str:
    """The path as messages give it: a long one is cut in the middle, and what cannot be printed is escaped."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in os.fspath(path))
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}...{text[-_SHOWN // 2 :]}"


def check_writable(folder: Path, option: str = "--output_dir") -> None:
    """Refuse a folder in which nothing can be written, existing or still to be made; nothing is left there.

    Args:
        folder: The folder.
        option: The option that gives it.

    Raises:
        UserError: If it cannot, with the system's reason.
    """
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        if place != folder:
            tempfile.TemporaryDirectory(prefix=".dualsft-", dir=place).cleanup()
        elif os.stat(folder) and not os.access(folder, os.W_OK | os.X_OK):  # nothing is made where others might find it
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"{named(folder)} cannot be written ({error.strerror}); choose another {option}.") from error
