"""Which of several sources a place, or a mistake, is in."""

from collections.abc import Iterator
from contextlib import contextmanager

from dualsft.errors import UserError


@contextmanager
def labelling(label: str) -> Iterator[None]:
    """Say which of several sources a mistake is in."""
    try:
        yield
    except UserError as error:
        raise UserError(labelled(label, str(error))) from error


def labelled(label: str, told: str) -> str:
    """What is told of a file, behind a label; a path as label stands in place of the file's name."""
    name = label.rpartition("/")[2]
    if label and told.startswith((f"{name},", f"{name}:")):
        return label + told.removeprefix(name)
    return f"{label}: {told}" if label and not told.startswith(label) else told
