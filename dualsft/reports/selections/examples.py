"""The examples with the highest scores, those on both sides of the cut, and those with the lowest, in full."""

from collections.abc import Sequence
from typing import Any

from dualsft.errors import UserError
from dualsft.reports.blocks import Block, Example, Piece, Section, Text
from dualsft.reports.selections.subject import Subject
from dualsft.reports.selections.texts import cut, record_pieces
from dualsft.reports.selections.tokens import coloured, telling, utilities
from dualsft.reports.words import counted

_MOST, _AT_CUT = 5, 3  # examples at either end, and on either side of the cut


def examples(subject: Subject) -> Section:
    """One part for each group of examples, each example with all that is known of it."""
    groups = _groups(subject)
    shown = list(dict.fromkeys(row for _, rows in groups for row in rows))
    painter = _Painter(subject, shown)
    parts = [Section(title, [painter.example(row) for row in rows]) for title, rows in groups if rows]
    return Section("Examples", painter.notes(), parts)


def _groups(subject: Subject) -> list[tuple[str, list[int]]]:
    """The title of each group with its rows; no row is in two."""
    order = [int(row) for row in subject.order]
    most = min(_MOST, -(-len(order) // 3))
    highest, lowest = order[:most], order[max(most, len(order) - most) :][::-1]
    between = [row for row in order if row not in {*highest, *lowest}]
    chosen = [row for row in between if subject.rows.selected[row]][-_AT_CUT:] if subject.cut is not None else []
    left = [row for row in between if not subject.rows.selected[row]][:_AT_CUT] if subject.cut is not None else []
    return [
        ("Highest scores", highest),
        ("Just above the cut: the last that were chosen", chosen),
        ("Just below the cut: the first that were not", left),
        ("Lowest scores", lowest),
    ]


class _Painter:
    """Makes the examples of a selection, with their tokens coloured where there are scores by token."""

    def __init__(self, subject: Subject, shown: Sequence[int]) -> None:
        self._subject = subject
        self._tokens = subject.tokens(shown)
        self._tokenizer: Any
        self._tokenizer, self._lacks = _tokenizer(subject) if self._tokens else (None, "")

    def notes(self) -> list[Block]:
        """How to read the examples, and what is not there."""
        told = []
        if self._tokenizer is not None:
            told.append(
                "A token's colour is its share of the example's score: blue speaks for the example, orange and dotted "
                "against it; the strongest colour is that of the example's most telling token."
            )
        elif self._tokens:
            told.append(f"Tokens are not coloured, as the tokenizer is not at hand: {self._lacks}")
        else:
            told.append(
                "Tokens are not coloured, as their scores were not kept; model.token_scores: true has select keep "
                "them, and --token_scores has report compute them."
            )
        if self._subject.pool[0] is None:
            told.append(f"Only chosen examples have their text, as the pool is not at hand: {self._subject.pool[1]}")
        return [Text(text if text.endswith(".") else f"{text}.", "note") for text in told]

    def example(self, row: int) -> Example:
        """One example in full."""
        pieces, note = self._text(row)
        return Example(f"Example {row:,}", self._facts(row), pieces, note)

    def _text(self, row: int) -> tuple[list[Piece], str]:
        if self._tokenizer is not None and row in self._tokens:
            unit = self._subject.unit
            found = utilities(self._tokenizer, *self._tokens[row])
            return cut(coloured(found, unit)), telling(found, unit)
        record = self._subject.record(row)
        if record is None:
            return [Piece("(its text is not at hand)", learnt=False)], ""
        return record_pieces(record, self._subject.about.data.format), ""

    def _facts(self, row: int) -> str:
        subject = self._subject
        place = f"place {subject.places[row]:,} of {len(subject.order):,}"
        facts = [f"score {subject.shown(float(subject.rows.score[row]))}", place]
        facts += [counted(int(subject.rows.tokens[row]), "supervised token")]
        facts += [f"source {name}"] if (name := subject.source(row)) else []
        return " · ".join([*facts, "chosen" if subject.rows.selected[row] else "not chosen"])


def _tokenizer(subject: Subject) -> tuple[Any, str]:
    """The base model's tokenizer, or None and why it cannot be loaded."""
    try:
        return subject.tokenizer(), ""
    except UserError as error:
        return None, str(error)
