"""The scores against the examples' lengths, and against their losses where these are known."""

from typing import Any

import numpy as np

from dualsft.matrix.sketches import LOSS
from dualsft.reports.blocks import Block, Picture, Table, Text
from dualsft.reports.figures import asinh_edges, count_map, linear_width, neutral
from dualsft.reports.selections.subject import Subject
from dualsft.reports.words import percent
from dualsft.selection.diagnostics import LengthBin
from dualsft.selection.diagnostics.examples import rank_correlation

_CELLS = 40
_STRONG, _WEAK = 0.5, 0.2  # rank correlations from which on the order by score is much, and something, of another


def relations(subject: Subject) -> list[Block]:
    """Length first, then loss."""
    return [*_length(subject), *_loss(subject)]


def _length(subject: Subject) -> list[Block]:
    lengths, rows = subject.selection.diagnostics.lengths, subject.rows
    if not lengths.bins:
        return []
    told = _correlated("length", lengths.correlation)
    if lengths.pool and lengths.selected:
        pool, chosen = lengths.pool["0.5"], lengths.selected["0.5"]
        told += f" The median example has {pool:,.0f} supervised tokens, the median chosen one {chosen:,.0f}."
    table = [
        [_range(of), f"{of.rows:,}", f"{of.selected:,}", percent(of.selected / of.rows)]
        for of in lengths.bins
        if of.rows
    ]
    numbers = Table("Examples by length", ["supervised tokens", "examples", "chosen", "share"], table, folded=True)
    shown = rows.scored & (rows.tokens > 0)
    if not shown.any():
        return [numbers]
    return [Text(told), _map(subject, "length", rows.tokens.astype(float), shown, True, told, numbers)]


def _range(of: LengthBin) -> str:
    return f"{of.shortest:,}" if of.shortest == of.longest else f"{of.shortest:,} to {of.longest:,}"


def _loss(subject: Subject) -> list[Block]:
    table, rows = subject.selection.examples, subject.rows
    if LOSS not in table.column_names:
        told = "The examples' losses were not kept: select measures them where the data allocator needs them."
        return [Text(told, "note")]
    loss = table[LOSS].to_numpy()
    shown = rows.scored & np.isfinite(loss)
    if not shown.any():
        return []
    told = _correlated("loss", rank_correlation(loss[shown], rows.score[shown]))
    return [Text(told), _map(subject, "loss", loss, shown, False, told, None)]


def _correlated(what: str, found: float | None) -> str:
    if found is None:
        return f"Scores and {what} have no rank correlation: one of them is the same everywhere."
    if abs(found) >= _STRONG:
        return f"Scores go with {what} (rank correlation {found:z.2f}): see whether it is {what} that was chosen."
    if abs(found) >= _WEAK:
        return f"Scores go with {what} to some extent (rank correlation {found:z.2f})."
    return f"Scores hardly go with {what} (rank correlation {found:z.2f})."


def _map(
    subject: Subject, what: str, x: np.ndarray, shown: np.ndarray, logarithmic: bool, told: str, numbers: Table | None
) -> Picture:
    label = "supervised tokens" if what == "length" else "loss of the base model (nats per token)"
    return Picture(
        f"{subject.file_name}-score-against-{what}",
        f"Score against {what}: how many examples are where; the dashed line is the cut.",
        f"Density map of {int(shown.sum()):,} examples by {what} and score. {told}",
        lambda figure: _paint(figure, subject, x[shown], subject.rows.score[shown], logarithmic, label),
        numbers=numbers,
    )


def _paint(figure: Any, subject: Subject, x: np.ndarray, score: np.ndarray, logarithmic: bool, label: str) -> None:
    axes = figure.subplots()
    score = score / subject.unit.size
    rows, columns = asinh_edges(score, _CELLS), _columns(x, logarithmic)
    counts, *_ = np.histogram2d(x, score, (columns, rows))
    count_map(figure, axes, columns, rows, counts, "examples")
    axes.set_yscale("asinh", linear_width=linear_width(score))
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
    if subject.cut is not None:
        axes.axhline(subject.cut / subject.unit.size, color=neutral(), linewidth=1.0, linestyle="--")
    axes.set(xlabel=label, ylabel=subject.unit.label("score"))


def _columns(x: np.ndarray, logarithmic: bool) -> np.ndarray:
    """Edges of cells of the same width, in logarithms if asked for; whole numbers of tokens fall between them."""
    if not logarithmic:
        low, high = float(x.min()), float(x.max())
        return np.linspace(low, high if high > low else low + 1.0, _CELLS + 1)
    edges = np.geomspace(x.min(), x.max() + 1, _CELLS + 1)
    return np.unique(np.floor(edges)) - 0.5
