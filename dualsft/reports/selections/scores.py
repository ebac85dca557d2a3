"""The distribution of the examples' scores, with the cut."""

from typing import Any

import numpy as np

from dualsft.reports.blocks import Block, Picture, Table, Text
from dualsft.reports.figures import asinh_edges, grid, linear_width, neutral, stacked_bins
from dualsft.reports.selections.subject import Subject
from dualsft.reports.words import percent

_BINS = 60


def scores(subject: Subject) -> list[Block]:
    """The histogram, what it says of the cut, and the quantiles."""
    found = subject.rows.score[subject.rows.scored]
    if not len(found):
        return [Text("No example has a score.")]
    figures = subject.selection.diagnostics.examples
    picture = Picture(
        f"{subject.file_name}-scores",
        "How many examples have which score; away from zero the axis is logarithmic.",
        f"Histogram of {len(found):,} scores, of which {percent(figures.positive_share)} are positive; the lowest is "
        f"{subject.shown(found.min())}, the median {subject.shown(np.median(found))}, the highest "
        f"{subject.shown(found.max())}. {_cut(subject)}",
        lambda figure: _paint(figure, subject),
        numbers=_quantiles(subject),
    )
    return [Text(_cut(subject)), picture, *_left_out(subject)]


def _cut(subject: Subject) -> str:
    if subject.cut is None:
        return "There is no cut: all examples with a score are chosen, or none."
    near = subject.rows.score[subject.rows.scored]
    tenth = abs(subject.cut) / 10
    close = int((np.abs(near - subject.cut) <= tenth).sum())
    what = f"{percent(close / len(near))} of the examples have a score within a tenth of it"
    if subject.is_cut_clean and np.ptp(near) == 0:
        return f"All scores are {subject.shown(subject.cut)}: the first rows are chosen."
    if subject.is_cut_clean:
        return f"The cut is at {subject.shown(subject.cut)}: what scores higher is chosen. {what}."
    return (
        f"The lowest score of a chosen example is {subject.shown(subject.cut)}; some with higher scores are left out, "
        "as the allocator looks at more than scores."
    )


def _paint(figure: Any, subject: Subject) -> None:
    axes = figure.subplots()
    rows, size = subject.rows, subject.unit.size
    edges = asinh_edges(rows.score[rows.scored] / size, _BINS)
    series = []
    for name, of in (("left out", rows.scored & ~rows.selected), ("chosen", rows.scored & rows.selected)):
        series.append((name, np.histogram(rows.score[of] / size, edges)[0]))
    stacked_bins(axes, edges, series)
    axes.set_xscale("asinh", linear_width=linear_width(rows.score[rows.scored] / size))
    axes.axvline(0, color=neutral(), linewidth=0.7, alpha=0.6)
    if subject.cut is not None:
        axes.axvline(subject.cut / size, color=neutral(), linewidth=1.1, linestyle="--", label="cut")
    axes.set(xlabel=subject.unit.label("score"), ylabel="examples")
    axes.legend()
    grid(axes)


def _quantiles(subject: Subject) -> Table:
    found = subject.selection.diagnostics.examples.quantiles
    rows = [[f"{float(level):.0%}", subject.shown(value)] for level, value in found.items()]
    return Table(
        "Quantiles of the scores", ["share of the examples below", subject.unit.label("score")], rows, folded=True
    )


def _left_out(subject: Subject) -> list[Block]:
    """How many rows could not be chosen, and why."""
    counts = {"near-duplicate of a chosen one": subject.about.counts.examples.near_duplicates}
    why = {"empty": "no response", "truncated": "response beyond data.max_length", "nonfinite": "not finite"}
    status = subject.selection.examples["status"].value_counts().to_pylist()
    counts |= {why.get(of["values"], of["values"]): of["counts"] for of in status if of["values"] != "ok"}
    rows = [[reason, f"{count:,}"] for reason, count in counts.items() if count]
    return [Table("Rows that could not be chosen", ["why", "rows"], rows)] if rows else []
