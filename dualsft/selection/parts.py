"""What the manifest says of a part that the user can choose: which class it is, and its options."""

import json
import re
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
        "options": {name: _plain(value) for name, value in options.items()},
        **({"private": {name: _plain(value) for name, value in private.items()}} if private else {}),
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
    if strange := [need for need in needs if need not in known]:
        raise UserError(
            f"{name} needs {', '.join(map(str, strange))}, which is none of {', '.join(sorted(known))}; mend it."
        )


def _plain(value: object) -> Any:
    """A value as JSON holds it, or what it looks like, but for its place in memory."""
    return json.loads(json.dumps(value)) if _is_plain(value) else re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
