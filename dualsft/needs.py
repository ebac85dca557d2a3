"""What a plugin's method is given, which remembers what was read without being there, so that an error can say so.

A scorer, a path or an allocator names in its ``needs`` what it uses beyond what costs nothing; the rest is None.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from dualsft.errors import UserError, blaming


class Given:
    """The base of the dataclasses that plugins are given: it remembers which fields were read while they were None.

    Attributes:
        asked_for: Field -> the attribute of the plugin's class in which it is asked for, and the name to put there.
    """

    asked_for: ClassVar[Mapping[str, tuple[str, str]]] = {}

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if value is None:
            vars(self).setdefault("_missed", {})[name] = None
        return value

    def forget(self) -> None:
        """Forget what was read so far."""
        vars(self).pop("_missed", None)

    def undeclared(self, plugin: object) -> list[tuple[str, str, str]]:
        """List the fields that were read but not asked for: each with the attribute to ask in, and the name to put."""
        missed = [(field, *self.asked_for[field]) for field in vars(self).get("_missed", {}) if field in self.asked_for]
        return [(field, where, need) for field, where, need in missed if need not in getattr(plugin, where)]


def by_own_name(*fields: str, where: str = "needs") -> dict[str, tuple[str, str]]:
    """Fields that are asked for by their own names."""
    return {field: (where, field) for field in fields}


def ask(plugin: object, method: str, given: Given, *more: object) -> Any:
    """Call a plugin's method on what it is given.

    Raises:
        UserError: if it fails; where it used what it had not asked for, with the name to add.
    """
    given.forget()
    try:
        with blaming(plugin, method):
            found = getattr(plugin, method)(given, *more)
    except UserError as error:
        cause = error.__cause__
        if _is_of_none(cause) and (undeclared := given.undeclared(plugin)):
            raise UserError(*_told(error.problem, plugin, undeclared)) from cause
        raise
    if found is None and (undeclared := given.undeclared(plugin)):
        raise UserError(*_told(f"{type(plugin).__name__}.{method} gave back None", plugin, undeclared))
    return found


def _is_of_none(cause: BaseException | None) -> bool:
    """Whether an exception may come of a None: most say so, and an assertion that there is a value says nothing."""
    return isinstance(cause, AssertionError) or (cause is not None and "None" in str(cause))


def _told(problem: str, plugin: object, undeclared: list[tuple[str, str, str]]) -> tuple[str, str]:
    """The problem and the remedy."""
    fields = " and ".join(field for field, _, _ in undeclared)
    additions = dict.fromkeys(f"{need!r} to {type(plugin).__name__}.{where}" for _, where, need in undeclared)
    return f"{problem}: it uses {fields} without asking for it", f"add {' and '.join(additions)}"
