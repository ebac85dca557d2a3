import unicodedata

import pytest

from dualsft.selection.summary.text import one_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\n lines\t and\x0btabs", "two lines and tabs"),
        ("\x1b[2Jgone\x07", r"\x1b[2Jgone\x07"),
        ("left\u202eto right\u2066", r"left\u202eto right\u2066"),
        ("half \ud83d", r"half \ud83d"),
        ("tag \U000e0041", r"tag \U000e0041"),
        ("e\u0301 and 数学", "e\u0301 and 数学"),
        ("", ""),
    ],
    ids=["white space", "escape sequence", "direction", "surrogate", "plane 14", "letters", "empty"],
)
def test_nothing_in_a_text_moves_the_cursor(text: str, shown: str) -> None:
    """What is no letter, number, sign or blank is shown as an escape."""
    assert one_line(text, 80) == shown
    assert one_line(text, 80).isprintable()


@pytest.mark.parametrize("text", ["plain text, long enough", "数学数学数学数学数学数学", "e\u0301" * 30, "\x00" * 30])
@pytest.mark.parametrize("width", [5, 6, 20])
def test_no_text_is_wider_than_the_line(text: str, width: int) -> None:
    """Wide characters take two columns, combining ones none; what is cut ends in an ellipsis."""
    shown = one_line(text, width)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in shown)
    columns = len(shown) + wide - sum(map(bool, map(unicodedata.combining, shown)))
    assert width - 2 < columns <= width or shown == text
    assert shown.endswith("…")
