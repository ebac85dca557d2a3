"""Tokens, spelled and coloured."""

import pytest

from dualsft.reports.selections.tokens import coloured, spell, telling, utilities
from dualsft.reports.words import Unit
from tests.world.models import tiny_tokenizer

TEXTS = ["The sea is wide, and deep.", "  two  spaces\nand lines\n", "20 € für naïve 日本語 🐢!", "a"]


@pytest.mark.parametrize("text", TEXTS)
def test_spelled_tokens_are_the_text(text: str) -> None:
    """The pieces together are the decoded text, each token is in one of them, and no character is broken."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = spell(tokenizer, ids)
    assert "".join(piece for piece, _, _ in found) == tokenizer.decode(ids)
    assert [k for _, start, end in found for k in range(start, end)] == list(range(len(ids)))
    assert all("�" not in piece for piece, _, _ in found)


def test_utilities_add_up() -> None:
    """What is spelled together has its tokens' utilities together, so that the sum stays the example's score."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(TEXTS[2])["input_ids"]
    scores = [(-1.0) ** k * k for k in range(len(ids))]
    found = utilities(tokenizer, ids, scores)
    assert sum(value for _, value in found) == pytest.approx(sum(scores))


def test_colours_follow_the_utilities() -> None:
    """The strongest token has the strongest colour, signs are kept, and what says nothing has none."""
    pieces = coloured([("a", 2.0), ("b", -1.0), ("c", 0.01), ("d", 0.0)], Unit(0))
    assert [piece.level for piece in pieces] == [5, -3, 0, 0]
    assert [piece.level for piece in coloured([("a", 0.0)], Unit(0))] == [0]


def test_telling_tokens_in_words() -> None:
    """The tokens for and against are named with their sums over the places where they stand."""
    found = [(" sea", 2e-6), ("sea", 1e-6), (" dry", -4e-6), ("\n", 0.0)]
    assert telling(found, Unit(-6)) == "most for it: “sea” +3.0; most against it: “dry” −4.0"
    assert telling([("a", 0.0)], Unit(0)) == ""
