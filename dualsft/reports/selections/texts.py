"""A record as text: what is asked, and what is learnt, in the order in which the model reads it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from dualsft.data.options import FormatOptions
from dualsft.data.texts import as_messages, as_text, is_missing
from dualsft.errors import UserError
from dualsft.reports.blocks import Piece

_ANSWERS = ("assistant", "gpt", "model", "bot", "chatbot")
LONGEST = 6000  # characters of an example on the page


def record_pieces(record: Mapping[str, Any], options: FormatOptions) -> list[Piece]:
    """The pieces of a record, cut behind `LONGEST` characters."""
    return cut(list(_pieces(record, options)))


def snippet(record: Mapping[str, Any], options: FormatOptions, longest: int = 240) -> str:
    """The beginnings of what is asked and of what is learnt."""
    pieces = list(_pieces(record, options))
    parts = ("".join(of.text for of in pieces if of.learnt is learnt) for learnt in (False, True))
    return " → ".join(_start(text, longest // 2) for text in parts if text.strip())


def cut(pieces: list[Piece]) -> list[Piece]:
    """Pieces of at most `LONGEST` characters in all, and a note of what is left out."""
    kept: list[Piece] = []
    room = LONGEST
    for piece in pieces:
        if len(piece.text) > room:
            left = sum(len(of.text) for of in pieces) - LONGEST
            shown = Piece(piece.text[:room], piece.level, piece.title, piece.learnt)
            return [*kept, shown, Piece(f" … ({left:,} more characters)", learnt=False)]
        kept.append(piece)
        room -= len(piece.text)
    return kept


def _pieces(record: Mapping[str, Any], options: FormatOptions) -> Iterator[Piece]:
    columns = tuple(record)
    try:
        form, read = options.recognise(columns), options.text_columns(columns)
    except UserError:  # a record without the columns of the others
        form, read = "text", columns
    learnt = {"prompt_response": read[1:], "alpaca": read[-1:], "text": read}.get(form, ())
    shown = [column for column in read if not is_missing(record.get(column)) and record[column] != ""]
    for place, column in enumerate(shown):
        value, end = record[column], "\n" if place < len(shown) - 1 else ""
        turns = as_messages(value)
        if turns is None:
            yield Piece(f"{_plain(value)}{end}", learnt=column in learnt)
        else:
            yield from (piece for turn in turns for piece in _turn(turn))


def _turn(turn: Mapping[str, Any]) -> Iterator[Piece]:
    who = str(turn.get("role", turn.get("from", "")))
    yield Piece(f"{who}: ", learnt=False)
    yield Piece(f"{_plain(turn.get('content', turn.get('value')))}\n", learnt=who in _ANSWERS)


def _plain(value: Any) -> str:
    if (text := as_text(value)) is not None:
        return text
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _start(text: str, longest: int) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= longest else f"{plain[:longest].rstrip()}…"
