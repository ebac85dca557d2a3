"""Examples that look wrong to the scores: those as far below zero as the best, of the budget's number, are above it.

How far that is depends on the scores alone: under a quota, or by chance, examples with next to no score are chosen too.
"""

import numpy as np

from dualsft.reports.blocks import Block, Table, Text
from dualsft.reports.selections.subject import Subject
from dualsft.reports.selections.texts import snippet
from dualsft.reports.words import counted, percent

_MOST = 25
_WHY = {
    True: "no example has a score as far below zero as the highest scores, as many as were chosen, are above it",
    False: "no example has a positive score, so that there is nothing to compare negative ones with",
}


def suspects(subject: Subject) -> list[Block]:
    """What counts as strongly negative, and the most negative ones in a table."""
    score = subject.rows.score
    found = [int(row) for row in subject.order[::-1] if score[row] <= -_strength(subject)]
    if not found:
        return [Text(f"None: {_WHY[_strength(subject) < np.inf]}.")]
    told = (
        f"{counted(len(found), 'example')} ({percent(len(found) / len(subject.order))}) would, by their scores, do at "
        f"least as much harm to the validation loss as {_measure(subject)} does good. Wrong answers, broken "
        "texts and tasks that contradict the target are often among them; so are sound examples of another kind, "
        f"so look before you drop one.{_concentrated(subject, found)}"
    )
    head = ["example", subject.unit.label("score"), "tokens", "source", "text (what is asked → what is learnt)"]
    rows = [_row(subject, row) for row in found[:_MOST]]
    caption = f"The {counted(len(rows), 'example')} with the lowest scores"
    return [Text(told), Table(caption, head, rows, frozenset({3, 4}))]


def _strength(subject: Subject) -> float:
    """How far below zero a score must be: as far as a usual positive one is above, or the budget's last, if higher."""
    return max(_usual(subject), _last(subject))


def _usual(subject: Subject) -> float:
    """The median of the positive scores; infinite without one."""
    positive = subject.rows.score[subject.rows.scored & (subject.rows.score > 0)]
    return float(np.median(positive)) if len(positive) else np.inf


def _last(subject: Subject) -> float:
    """The lowest of the highest scores, as many as were chosen; zero if none was chosen, or all were."""
    if subject.cut is None:
        return 0.0
    return float(subject.rows.score[subject.order[int(subject.rows.selected.sum()) - 1]])


def _measure(subject: Subject) -> str:
    """What the harm is measured by, in words."""
    if _last(subject) >= _usual(subject):
        return f"the last of the {int(subject.rows.selected.sum()):,} best ones"
    return "a usual one with a positive score (the median)"


def _row(subject: Subject, row: int) -> list[str]:
    record = subject.record(row)
    text = "(not at hand)" if record is None else snippet(record, subject.about.data.format)
    rows = subject.rows
    return [
        f"{row:,}",
        subject.shown(float(rows.score[row])),
        f"{rows.tokens[row]:,}",
        subject.source(row) or "–",
        text,
    ]


def _concentrated(subject: Subject, found: list[int]) -> str:
    """The source that has the most of them, where it has more than its share."""
    sources = subject.selection.diagnostics.sources
    if sources is None or len(sources.groups) < 2 or subject.pool[0] is None:
        return ""
    names = [subject.source(row) for row in found]
    most = max(dict.fromkeys(names), key=names.count)
    share, total = names.count(most) / len(names), sum(group.rows for group in sources.groups)
    usual = sum(group.rows for group in sources.groups if group.name == most) / total
    return (
        f" {percent(share)} of them are from {most or 'no source'}, which is {percent(usual)} of the pool."
        if share > usual
        else ""
    )
