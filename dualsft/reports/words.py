"""Numbers as a page shows them."""

import math
from dataclasses import dataclass


def percent(share: float) -> str:
    """A share: with a digit behind the point below a tenth, where that tells something."""
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{share:.1%}" if 0 < share < 0.0995 else f"{share:.0%}"


def signed(value: float | None, digits: int = 3) -> str:
    """A number with its sign, to so many digits; a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:+,.0f}" if abs(value) >= 10**digits else f"{value:+#.{digits}g}".removesuffix(".")
    return text.replace("-", "−") if value else "0"


def number(value: float | None, digits: int = 4) -> str:
    """A number to so many digits; a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".removesuffix(".")
    return text.replace("-", "−")


@dataclass(frozen=True)
class Unit:
    """A power of a thousand in which small or large scores are shown, so that they have few digits.

    Attributes:
        exponent: Its power of ten; 0 where scores are of a usual size.
    """

    exponent: int

    @staticmethod
    def of(largest: float) -> "Unit":
        """The unit in which numbers up to this size have one to three digits before the point."""
        if not largest > 0 or 0.1 <= largest < 1000:
            return Unit(0)
        return Unit(3 * math.floor(math.log10(largest) / 3))

    @property
    def size(self) -> float:
        """The unit itself."""
        return 10.0**self.exponent

    def show(self, value: float | None, digits: int = 3) -> str:
        """A score in this unit, with its sign."""
        return signed(None if value is None else value / self.size, digits)

    def label(self, what: str) -> str:
        """A quantity with the unit behind it."""
        return f"{what} ({self})" if self.exponent else what

    def __str__(self) -> str:
        return f"10{str(self.exponent).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


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


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"


def counted(count: int, thing: str) -> str:
    """A count with its noun: 1 step, 2 steps."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def listed(words: list[str]) -> str:
    """Words as a sentence lists them: a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
