"""What the manifest says of a part that the user can choose: which class it is, and its options."""

import json
from collections.abc import Collection, Sequence
from typing import Any

from dualsft.errors import UserError


def describe_part(part: object) -> dict[str, Any]:
    """The ``class_path`` of a part and its ``options``: all that it keeps under a public name, but a scorer's needs.

    What it keeps under a private name is there as ``private``, as far as it is plain: it may decide the outcome too.
    """
    kind = type(part)
    private = {name: value for name, value in vars(part).items() if name.startswith("_") and _is_plain(value)}
    options = {name: value for name, value in vars(part).items() if not name.startswith("_") and name != "needs"}
    return {
        "class_path": f"{kind.__module__}.{kind.__qualname__}",
        "options": json.loads(json.dumps(options, default=str)),
        **({"private": private} if private else {}),
    }


def check_needs_known(part: object, needs: object, known: Sequence[str]) -> None:
    """Refuse a part that needs what nobody gives.

    Args:
        part: A scorer or an allocator.
        needs: What it says that it needs.
        known: The names of what there is.

    Raises:
        UserError: naming the part, and what there is.
    """
    name = type(part).__name__
    if isinstance(needs, str) or not isinstance(needs, Collection):
        raise UserError(f"{name} has needs {needs!r}; give a tuple of names, such as {tuple(known[:1])}.")
    if strange := sorted(set(needs) - set(known)):
        raise UserError(f"{name} needs {', '.join(strange)}, which is none of {', '.join(sorted(known))}; mend it.")


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
