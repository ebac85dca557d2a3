"""Numbers as a page shows them."""

import math


def percent(share: float) -> str:
    """A share: with a digit behind the point below a tenth, where that tells something."""
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{share:.1%}" if 0 < share < 0.0995 else f"{share:.0%}"


def signed(value: float | None, digits: int = 3) -> str:
    """A number with its sign, to so many digits; a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:+.{digits}g}".replace("-", "−", 1) if value else "0"


def number(value: float | None, digits: int = 4) -> str:
    """A number to so many digits; a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".removesuffix(".")
    return text.replace("-", "−", 1)


def short(value: float) -> str:
    """A large number in a few characters: 3.05 million."""
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if abs(value) >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:,.0f}"


def memory(size: float) -> str:
    """A number of bytes in the unit that suits it."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:,.3g} {unit}" if size < 1000 * 2**power else f"{size / 2**power:,.0f} {unit}"
    return f"{size:,.0f} B"


def counted(count: int, thing: str) -> str:
    """A count with its noun: 1 step, 2 steps."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def listed(words: list[str]) -> str:
    """Words as a sentence lists them: a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
