"""Which parameters may be trained at all, by patterns over their names; all are scored in any case."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from dualsft.errors import UserError


def trainable_names(names: Iterable[str], trainable: Sequence[str], frozen: Sequence[str]) -> set[str]:
    """The parameters that may be trained.

    A pattern is for every name that contains it; in it ``*`` stands for anything, ``?`` for one character, and
    ``[0-3]`` for one of several.

    Args:
        names: The names of all parameters.
        trainable: Patterns for those that may be trained; empty for all.
        frozen: Patterns for those that may not even so.

    Raises:
        UserError: if a pattern is for no name, or none is left.
    """
    names = list(names)
    for key, patterns in {"trainable": trainable, "frozen": frozen}.items():
        for pattern in patterns:
            if not _matching(names, [pattern]):
                raise UserError(
                    f"model.{key} has the pattern {pattern!r}, which no parameter's name contains; names are such as "
                    f"{names[0]} and {names[-1]} (a tied head goes by the embedding's)."
                )
    left = _matching(names, trainable or ["*"]) - _matching(names, frozen)
    if not left:
        raise UserError("model.trainable and model.frozen leave no parameter to train; drop a pattern.")
    return left


def _matching(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    return {name for name in names if any(fnmatchcase(name, f"*{pattern}*") for pattern in patterns)}
