"""Records as text."""

from typing import Any

import pytest

from dualsft.data.options import FormatOptions
from dualsft.reports.blocks import Piece
from dualsft.reports.selections.texts import LONGEST, cut, record_pieces, snippet

TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    ("record", "asked", "learnt"),
    [
        ({"prompt": "Q", "response": "A", "source": "x"}, "Q\n", "A"),
        ({"prompt": "Q", "completion": "A"}, "Q\n", "A"),
        ({"instruction": "Q", "input": "", "output": "A"}, "Q\n", "A"),
        ({"text": "all of it"}, "", "all of it"),
        ({"messages": TURNS}, "user: Q\nassistant: ", "A\n"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "human: Q\ngpt: ", "A\n"),
        ({"prompt": "Q", "response": None}, "Q", ""),
        ({"odd": {"a": 1}}, "", '{"a": 1}'),
    ],
)
def test_what_is_asked_and_what_is_learnt(record: dict[str, Any], asked: str, learnt: str) -> None:
    """Every format is shown with its answers apart from the rest, and a record of no format whole."""
    pieces = record_pieces(record, FormatOptions())
    assert "".join(piece.text for piece in pieces if not piece.learnt) == asked
    assert "".join(piece.text for piece in pieces if piece.learnt) == learnt


def test_long_texts_are_cut_with_a_note() -> None:
    """An example has no more characters than fit, whatever its pieces, and says how many are missing."""
    pieces = cut([Piece("a" * (LONGEST - 1)), Piece("b" * 3), Piece("c" * 7)])
    assert "".join(piece.text for piece in pieces[:-1]) == "a" * (LONGEST - 1) + "b"
    assert pieces[-1].text == " … (9 more characters)"
    assert cut([Piece("a" * LONGEST)]) == [Piece("a" * LONGEST)]


def test_snippets_show_both_ends() -> None:
    """A snippet has the beginning of what is asked and of what is learnt, on one line."""
    record = {"prompt": "a long\nquestion " * 20, "response": "short"}
    assert snippet(record, FormatOptions(), 40) == "a long question a lo… → short"
