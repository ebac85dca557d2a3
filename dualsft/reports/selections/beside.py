"""Several selections beside each other: what each chose, and how much of it two have in common."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from dualsft.reports.blocks import Block, Section, Table, Text
from dualsft.reports.selections.subject import Subject
from dualsft.reports.words import duration, percent
from dualsft.selection.diagnostics.examples import rank_correlation


def selections_section(subjects: Sequence[Subject]) -> Section:
    """The table of the selections, and that of their overlaps."""
    return Section("Selections beside each other", [_table(subjects), *_overlaps(subjects)])


def _table(subjects: Sequence[Subject]) -> Table:
    rows = []
    for subject in subjects:
        about, found = subject.about, subject.selection.diagnostics
        scorer = about.settings["scorer"].class_path.rpartition(".")[2]
        captured = [None if of is None else of.captured for of in (found.examples, found.parameters)]
        shares = ["–" if share is None else percent(share) for share in captured]
        counts = [f"{about.counts.examples.selected:,}", f"{about.counts.parameters.selected:,}"]
        seconds = duration(sum(of.seconds for of in about.phases))
        rows.append([subject.name, scorer, counts[0], shares[0], counts[1], shares[1], seconds])
    head = ["selection", "scorer", "examples", "score of the examples", "weights", "score of the weights", "time"]
    caption = "What each selection chose; their score is the share of the positive score that the chosen hold"
    return Table(caption, head, rows, frozenset({1}))


def _overlaps(subjects: Sequence[Subject]) -> list[Block]:
    rows = [_pair(one, other) for one, other in combinations(subjects, 2)]
    head = ["selections", "examples", "by chance", "weights", "by chance", "order of the scores"]
    caption = (
        "Overlap: the share of the smaller choice that the other has made too, and that of a random choice of its size"
    )
    note = "“Order of the scores” is the rank correlation of the examples' scores; – is where pools or models differ."
    return [Table(caption, head, rows), Text(note, "note")]


def _pair(one: Subject, other: Subject) -> list[str]:
    examples, weights = _examples(one, other), _weights(one, other)
    return [f"{one.name} / {other.name}", *_shares(examples), *_shares(weights), _order(one, other)]


def _shares(counts: tuple[int, int, int, int] | None) -> list[str]:
    """What two choices have in common, and by chance; from the sizes of both, of what is in both, and of all."""
    if counts is None or not min(counts[0], counts[1]) or not counts[3]:
        return ["–", "–"]
    first, second, both, size = counts
    return [percent(both / min(first, second)), percent(max(first, second) / size)]


def _same_pool(one: Subject, other: Subject) -> bool:
    return one.about.data.train.fingerprint == other.about.data.train.fingerprint


def _examples(one: Subject, other: Subject) -> tuple[int, int, int, int] | None:
    if not _same_pool(one, other):
        return None
    a, b = one.rows.selected, other.rows.selected
    return int(a.sum()), int(b.sum()), int((a & b).sum()), int((one.rows.scored | other.rows.scored).sum())


def _weights(one: Subject, other: Subject) -> tuple[int, int, int, int] | None:
    """The counts over all tensors; memory holds one tensor of each mask."""
    a, b = one.selection.stored_masks(), other.selection.stored_masks()
    if set(a) != set(b):
        return None
    counts = np.zeros(4, dtype=int)
    for name in a:
        first, second = a[name], b[name]
        if first.shape != second.shape:
            return None
        counts += [int(first.sum()), int(second.sum()), int((first & second).sum()), first.numel()]
    found = counts.tolist()
    return found[0], found[1], found[2], found[3]


def _order(one: Subject, other: Subject) -> str:
    if not _same_pool(one, other):
        return "–"
    both = one.rows.scored & other.rows.scored
    found = rank_correlation(one.rows.score[both], other.rows.score[both])
    return "–" if found is None else f"{found:.2f}"
