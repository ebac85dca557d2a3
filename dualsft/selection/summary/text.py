"""Texts of others on one line of a terminal: nothing in them moves the cursor, and none is wider than the line."""

import unicodedata

_ELLIPSIS = "…"


def one_line(text: str, width: int) -> str:
    """A text with its white space as single blanks and what does not print as escapes, cut to ``width`` columns."""
    shown: list[str] = []
    used = 0
    for character in " ".join(text.split()):
        part = character if character.isprintable() else _escape(character)
        used += sum(map(_columns, part))
        if used > width:
            return _cut("".join(shown), width)
        shown.append(part)
    return "".join(shown)


def _cut(text: str, width: int) -> str:
    """The text's beginning with an ellipsis behind it, together no wider than ``width`` columns."""
    while text and sum(map(_columns, text)) > width - 1:
        text = text[:-1]
    return f"{text}{_ELLIPSIS}"


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _columns(character: str) -> int:
    """How many columns of a terminal a character takes: none if it combines with the one before, two if it is wide."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
