"""What the manifest says of a part that the user can choose: which class it is, and its options."""

import json
from typing import Any


def describe_part(part: object) -> dict[str, Any]:
    """The ``class_path`` of a part and its ``options``: all that it keeps under a public name, but a scorer's needs."""
    kind = type(part)
    options = {name: value for name, value in vars(part).items() if not name.startswith("_") and name != "needs"}
    return {
        "class_path": f"{kind.__module__}.{kind.__qualname__}",
        "options": json.loads(json.dumps(options, default=str)),
    }
