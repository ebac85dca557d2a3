"""The validation sets that ``data.validation`` names: one source, or several with a name each."""

import re
from collections.abc import Mapping
from typing import Any

from dualsft.errors import UserError

_NAME = re.compile(r"[\w-]+")


def validation_sources(validation: str | Mapping[Any, str] | None) -> dict[str, str]:
    """The source of each validation set.

    Args:
        validation: A source, a mapping of names to sources, or None; as configured, so its names may be anything.

    Returns:
        Name -> source, in the order given; a single source has the name ``validation``.

    Raises:
        UserError: If a mapping is empty, or has a name that is not made of letters, digits, ``_`` and ``-``: names
            become part of the names of metrics and columns.
    """
    if validation is None:
        return {}
    if isinstance(validation, str):
        return {"validation": validation}
    if not validation:
        raise UserError("data.validation is an empty mapping: give a source, or names with a source each.")
    for name in validation:
        if not isinstance(name, str):
            raise UserError(f"data.validation names a set {name!r}, which is not text: put the name in quotes.")
        if not _NAME.fullmatch(name):
            raise UserError(f"data.validation names a set {name!r}: use letters, digits, _ and - alone.")
    return dict(validation)


def validation_key(name: str | None) -> str:
    """The option that gives a validation set's source.

    Args:
        name: The set's name in a mapping, or None for a single source.
    """
    return "data.validation" if name is None else f"data.validation.{name}"
