"""What the manifest says of a part that the user can choose: which class it is, and its options."""

import json
from typing import Any


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


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
