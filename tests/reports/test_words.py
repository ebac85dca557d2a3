"""Numbers as a page shows them."""

import pytest

from dualsft.reports.words import Unit, duration, memory, number, percent, short, signed


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (percent(0.0), "0%"),
        (percent(0.00001), "<0.1%"),
        (percent(0.0123), "1.2%"),
        (percent(0.0999), "10%"),
        (percent(1.0), "100%"),
        (number(2.89), "2.890"),
        (number(18.0), "18.00"),
        (number(123456.0), "123,456"),
        (number(None), "–"),
        (signed(-0.0421), "−0.0421"),
        (signed(-2e-7), "−2.00e−07"),
        (signed(0.0), "0"),
        (signed(float("nan")), "–"),
        (short(3_049_920), "3.05 million"),
        (short(999), "999"),
        (memory(1_127_514_112), "1.05 GiB"),
        (memory(1023 * 2**20), "1,023 MiB"),
        (memory(12), "12 B"),
        (duration(0.84), "0.8 s"),
        (duration(73.2), "73 s"),
        (duration(250.0), "4.2 min"),
        (duration(9000.0), "2.5 h"),
    ],
)
def test_numbers(shown: str, expected: str) -> None:
    """Digits, signs and units are those that a reader needs."""
    assert shown == expected


@pytest.mark.parametrize(("largest", "exponent"), [(0.0, 0), (0.5, 0), (999.0, 0), (4.6e-5, -6), (2e4, 3), (0.05, -3)])
def test_a_unit_leaves_one_to_three_digits(largest: float, exponent: int) -> None:
    """The largest score of a selection has one to three digits before the point, or three behind it."""
    unit = Unit.of(largest)
    assert unit.exponent == exponent
    assert unit.label("score") == ("score" if exponent == 0 else f"score ({unit})")


def test_a_unit_in_words() -> None:
    """A score is shown in the unit, and the unit as a power."""
    unit = Unit.of(4.58e-5)
    assert (unit.show(4.58e-5), unit.show(None), str(unit)) == ("+45.8", "–", "10⁻⁶")
