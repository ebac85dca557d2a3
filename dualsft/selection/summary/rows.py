"""The best, the borderline and the worst rows of a pool, one line each."""

import shutil
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from dualsft.data.records import Records, record_text
from dualsft.selection.artifact import Selection
from dualsft.selection.diagnostics.examples import Rows
from dualsft.selection.summary.text import one_line

_SHOWN = 5


def shown_rows(selection: Selection, records: Records) -> Iterator[str]:
    """Some rows with their scores and the beginnings of their texts; the chosen ones are marked.

    The borderline is between the lowest scores among the chosen and the highest among the others.
    """
    rows = Rows(selection.examples)
    width = shutil.get_terminal_size((100, 24)).columns
    columns = selection.about.data.format.text_columns(records.columns)
    legend = "      score  text (* is chosen)"
    for title, part in _parts(rows).items():
        yield f"{title:<10}{legend}".rstrip()
        for row in part:
            head = f"{'*' if rows.selected[row] else ' '} {row:>8,} {rows.score[row]:>10.3g}  "
            yield head + one_line(record_text(records[row], columns), max(20, width - len(head)))
        legend = ""


def _parts(rows: Rows) -> dict[str, list[int]]:
    """Title -> row numbers; a small pool is shown once and whole."""
    scored = np.flatnonzero(rows.scored)
    ranked: Int[np.ndarray, " row"] = scored[np.argsort(-rows.score[scored], kind="stable")]
    if len(ranked) <= 3 * _SHOWN:
        return {"all rows": ranked.tolist()} if len(ranked) else {}
    inner = ranked[_SHOWN:-_SHOWN]
    chosen, others = inner[rows.selected[inner]], inner[~rows.selected[inner]]
    border = [*chosen[-(_SHOWN - _SHOWN // 2) :].tolist(), *others[: _SHOWN // 2].tolist()]
    around = {"border": border} if len(chosen) and len(others) else {}
    return {"best rows": ranked[:_SHOWN].tolist(), **around, "worst": ranked[-_SHOWN:].tolist()}
