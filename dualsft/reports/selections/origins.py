"""The sources of the pool's rows: how many there are of each, and how many were chosen."""

from typing import Any

from dualsft.reports.blocks import Block, Picture, Table
from dualsft.reports.figures import grid
from dualsft.reports.selections.subject import Subject
from dualsft.reports.words import percent
from dualsft.selection.diagnostics import SourceGroup

_MOST_BARS = 12


def origins(subject: Subject) -> list[Block]:
    """A figure and a table, the most frequent source first; nothing where rows have no sources."""
    sources = subject.selection.diagnostics.sources
    if sources is None or len(sources.groups) < 2:
        return []
    groups = sources.groups
    rows, chosen = sum(of.rows for of in groups), sum(of.selected for of in groups)
    cells = [
        [
            _name(of),
            f"{of.rows:,}",
            percent(of.rows / rows),
            f"{of.selected:,}",
            percent(of.selected / chosen if chosen else 0.0),
            percent(of.selected / of.rows if of.rows else 0.0),
            subject.shown(of.score_sum / of.scored if of.scored else None),
        ]
        for of in groups
    ]
    head = ["source", "rows", "of the pool", "chosen", "of the chosen", "of its rows", subject.unit.label("mean score")]
    by = f"the column {sources.column}" if sources.column is not None else "the file"
    shown = groups[:_MOST_BARS]
    most = max(shown, key=lambda of: of.selected)
    picture = Picture(
        f"{subject.file_name}-sources",
        "Each source's share of the pool, and of the chosen examples.",
        f"Bar chart of {len(shown)} sources; most of the chosen are from {_name(most)}. The table has all figures.",
        lambda figure: _paint(figure, shown, rows, chosen),
        (4.6, 0.9 + 0.36 * len(shown)),
    )
    return [picture, Table(f"Examples by source ({by})", head, cells)]


def _name(of: SourceGroup) -> str:
    return "all others" if of.name is None else of.name or "(none)"


def _paint(figure: Any, groups: list[SourceGroup], rows: int, chosen: int) -> None:
    axes = figure.subplots()
    places = range(len(groups))
    pool = [100 * of.rows / rows for of in groups]
    taken = [100 * of.selected / chosen if chosen else 0.0 for of in groups]
    axes.barh([k - 0.19 for k in places], pool, 0.36, label="of the pool", color="C0")
    axes.barh([k + 0.19 for k in places], taken, 0.36, label="of the chosen", color="C1")
    names = [_name(of) for of in groups]
    axes.set_yticks(places, [name if len(name) <= 24 else f"{name[:23]}…" for name in names], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("share (%)")
    axes.legend()
    grid(axes, "x")
