"""The part of the page about evaluations: a table for each data, and the answers that training has undone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualsft.reports.blocks import Block, Section, Table, Text
from dualsft.reports.evaluations.folder import Evaluation
from dualsft.reports.words import listed, number, signed

_MOST, _LONGEST = 10, 300  # forgotten answers of a model, and characters of each


def evaluations_section(evaluations: Sequence[Evaluation]) -> Section:
    """One part for each data that models were evaluated on."""
    groups: dict[str, list[Evaluation]] = {}
    for of in evaluations:
        groups.setdefault(json.dumps(of.data, sort_keys=True, default=str), []).append(of)
    parts = [Section(f"On {_called(group[0].data)}", _blocks(group)) for group in groups.values()]
    return Section("Evaluations", [], parts)


def _called(data: Any) -> str:
    if isinstance(data, dict):
        return listed([str(name) for name in data])
    if isinstance(data, list):
        return listed([_called(of) for of in data])
    return Path(str(data)).name


def _blocks(group: Sequence[Evaluation]) -> list[Block]:
    bases = {of.base for of in group}
    base = next((of for of in group if of.model in bases), None)
    ordered = sorted(group, key=lambda of: of is not base)
    blocks: list[Block] = [_table(ordered, base)]
    if base is None:
        told = "The base model was not evaluated on these data, so that nothing can be said of what was forgotten."
        return [*blocks, Text(told, "note")] if any(bases) else blocks
    for of in ordered[1:]:
        blocks += _answers(base, of)
    return blocks


def _table(group: Sequence[Evaluation], base: Evaluation | None) -> Table:
    names = list(dict.fromkeys(name for of in group for name in of.metrics))
    rows = [
        [f"{of.name}{' (base model)' if of is base else ''}", *(_cell(of, base, name) for name in names)]
        for of in group
    ]
    caption = "Each model's metrics" + (", and in brackets the change against the base model's" if base else "")
    return Table(caption, ["model", *names], rows)


def _cell(of: Evaluation, base: Evaluation | None, name: str) -> str:
    value = of.metrics.get(name)
    if base is None or of is base or value is None or name not in base.metrics:
        return number(value)
    return f"{number(value)} ({signed(value - base.metrics[name], 2)})"


def _answers(base: Evaluation, of: Evaluation) -> list[Block]:
    """How many answers training has made right and undone, and some of those that it has undone."""
    both = [key for key in base.predictions if key in of.predictions]
    if not both:
        return []
    lost = [key for key in both if base.predictions[key]["correct"] and not of.predictions[key]["correct"]]
    won = [key for key in both if of.predictions[key]["correct"] and not base.predictions[key]["correct"]]
    told = Text(
        f"{of.name} forgot {len(lost):,} of {len(both):,} answers, which were right before, and learnt {len(won):,}."
    )
    rows = [_row(key, base.predictions[key], of.predictions[key]) for key in lost[:_MOST]]
    caption = f"Answers that {of.name} forgot" + (f", the first {_MOST}" if len(lost) > _MOST else "")
    words = frozenset({1, 2, 3})
    return [told, *([Table(caption, ["example", "prompt", "before", "after"], rows, words)] if rows else [])]


def _row(key: tuple[Any, Any], before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    name, row = key
    texts = (before["prompt"], before["generation"], after["generation"])
    return [f"{row}" if name is None else f"{name}, {row}", *(_cut(str(text)) for text in texts)]


def _cut(text: str) -> str:
    plain = text.strip()
    return plain if len(plain) <= _LONGEST else f"{plain[:_LONGEST]}…"
