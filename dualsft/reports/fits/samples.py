"""The answers that a fit logged to a few prompts: before training, and at the end."""

from collections.abc import Sequence
from typing import Any

from dualsft.reports.blocks import Block, Example, Piece, Table, Text
from dualsft.reports.fits.folder import Fit

_MOST, _LONGEST = 12, 1500


def samples(fit: Fit) -> list[Block]:
    """Prompt, reference and both answers, one under the other; what is the same in all is told."""
    pairs = _pairs(fit.samples)
    if not pairs:
        return [Text("No samples were logged; model.samples.number says how many prompts are answered.", "note")]
    shown: list[Block] = [_example(first, last) for first, last in pairs[:_MOST]]
    if len(pairs) > _MOST:
        shown.append(Text(f"{len(pairs) - _MOST:,} more are in logs/samples.jsonl.", "note"))
    return shown


def lost_answers(fit: Fit) -> list[Block]:
    """The sampled prompts whose answer equalled the reference before training, and does not at the end."""
    lost = [(a, b) for a, b in _pairs(fit.samples) if _is_right(a) and not _is_right(b)]
    if not lost:
        return []
    rows = [[_place(a), _cut(a["prompt"]), _cut(a["answer"]), _cut(b["answer"])] for a, b in lost]
    words = frozenset({1, 2, 3})
    return [
        Table(
            "Sampled answers that were right and are not any more", ["sample", "prompt", "before", "after"], rows, words
        )
    ]


def _pairs(found: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """For each prompt the first and the last sample."""
    groups: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for sample in found:
        groups.setdefault((str(sample["set"]), str(sample["example_id"])), []).append(sample)
    return [(of[0], of[-1]) for of in groups.values()]


def _example(first: dict[str, Any], last: dict[str, Any]) -> Example:
    pieces = [
        *_part("prompt", first["prompt"], learnt=False),
        *_part("reference", first["reference"]),
        *_part(f"step {first['step']}", first["answer"]),
        *(_part(f"step {last['step']}", last["answer"]) if last is not first else ()),
    ]
    right = [f"step {of['step']}" for of in (first, last) if _is_right(of)]
    facts = (
        f"equals the reference at {' and '.join(dict.fromkeys(right))}" if right else "not the reference, word for word"
    )
    return Example(_place(first), facts, pieces)


def _part(name: str, text: Any, learnt: bool = True) -> list[Piece]:
    return [Piece(f"{name}: ", title="", learnt=False), Piece(f"{_cut(text)}\n", learnt=learnt)]


def _place(sample: dict[str, Any]) -> str:
    return f"{sample['set']}, example {sample['example_id']}"


def _is_right(sample: dict[str, Any]) -> bool:
    return str(sample["answer"]).split() == str(sample["reference"]).split()


def _cut(text: Any) -> str:
    plain = str(text).strip()
    return plain if len(plain) <= _LONGEST else f"{plain[:_LONGEST]} …"
