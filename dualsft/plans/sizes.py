"""Amounts of memory, as people write them."""

import re

from dualsft.errors import UserError

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)
GIB = 2**30


def parse_memory(text: str) -> int:
    """Bytes of an amount such as 80GiB, 80GB or 80G; GB counts in powers of a thousand, GiB and G in those of 1,024.

    Raises:
        UserError: if it is none.
    """
    found = _AMOUNT.fullmatch(text)
    if not found or not float(found[1]):
        raise UserError(f"--memory is {text!r}; give an amount such as 80GiB, 80GB or 24G.")
    decimal = found[2] and not found[3] and text.strip().lower().endswith("b")
    return round(float(found[1]) * (1000 if decimal else 1024) ** _POWERS[found[2].lower()])


def gib(size: float) -> str:
    """Bytes in GiB, as the cells of a table have them."""
    return f"{size / GIB:,.2f}" if abs(size) < 10 * GIB else f"{size / GIB:,.1f}"
