"""An example's tokens, spelled and coloured by their utilities."""

from collections.abc import Sequence
from typing import Any

from dualsft.reports.blocks import Piece
from dualsft.reports.words import Unit

_LEVELS, _FAINTEST, _NAMED = 5, 0.06, 4
"""Strengths of a colour; the share of the strongest token below which there is none; tokens that are named."""


def utilities(tokenizer: Any, ids: Sequence[int], scores: Sequence[float]) -> list[tuple[str, float]]:
    """The text of each token, or of those that only together are characters, with its utility."""
    return [(text, sum(scores[start:end])) for text, start, end in spell(tokenizer, ids)]


def coloured(found: Sequence[tuple[str, float]], unit: Unit) -> list[Piece]:
    """One piece for each token; the colour's strength is its utility as a share of the example's largest."""
    most = max((abs(value) for _, value in found), default=0.0)
    return [Piece(text, _level(value, most), unit.show(value)) for text, value in found]


def telling(found: Sequence[tuple[str, float]], unit: Unit) -> str:
    """The tokens that speak most for an example and most against it, in words; the same ones are added up."""
    sums: dict[str, float] = {}
    for text, value in found:
        sums[text.strip() or text] = sums.get(text.strip() or text, 0.0) + value
    ranked = sorted(sums.items(), key=lambda of: of[1])
    best = [_named(*of, unit) for of in ranked[::-1][:_NAMED] if of[1] > 0]
    worst = [_named(*of, unit) for of in ranked[:_NAMED] if of[1] < 0]
    parts = [f"most for it: {', '.join(best)}" if best else "", f"most against it: {', '.join(worst)}" if worst else ""]
    return "; ".join(part for part in parts if part)


def _named(text: str, value: float, unit: Unit) -> str:
    return f"“{text if text.strip() else repr(text)[1:-1]}” {unit.show(value, 2)}"


def spell(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, int, int]]:
    """The text of each token, with the range of tokens that it takes: several where one is a part of a character.

    A token is spelled behind the one before it, as many tokenizers drop the space in front of a first one.
    """
    found, start = [], 0
    while start < len(ids):
        end = start + 1
        before = list(ids[max(0, start - 1) : start])
        known = _decoded(tokenizer, before)
        while "�" in (text := _decoded(tokenizer, [*before, *ids[start:end]])[len(known) :]) and end < len(ids):
            if end - start >= 8:  # no character has more bytes
                break
            end += 1
        found.append((text, start, end))
        start = end
    return found


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""


def _level(value: float, most: float) -> int:
    share = abs(value) / most if most else 0.0
    if share < _FAINTEST:
        return 0
    strength = min(_LEVELS, 1 + int(share * _LEVELS))
    return strength if value > 0 else -strength
