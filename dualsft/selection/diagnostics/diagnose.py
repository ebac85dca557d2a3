"""All diagnostics of a choice, and the two files that keep them beside it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dualsft.selection.diagnostics.examples import Rows, example_figures, length_figures, source_figures
from dualsft.selection.diagnostics.figures import Basis, Diagnostics
from dualsft.selection.diagnostics.parameters import WeightFigures
from dualsft.selection.diagnostics.rows import RowSources

DIAGNOSTICS, PARAMETERS = "diagnostics.json", "parameters.parquet"


def diagnose(
    examples: pa.Table, weights: WeightFigures, sources: RowSources | None, basis: Basis
) -> tuple[Diagnostics, pa.Table]:
    """Compute the diagnostics, and give the table of the parameters.

    Args:
        examples: The table of ``examples.parquet``.
        weights: The figures of the weights.
        sources: The sources of the rows, if they are known.
        basis: What the scores rest on.
    """
    rows = Rows(examples)
    by_source = source_figures(rows, sources) if sources else None
    figures = Diagnostics(example_figures(rows), weights.together, length_figures(rows), by_source, basis)
    return figures, weights.table


def write_diagnostics(folder: Path, diagnostics: Diagnostics, parameters: pa.Table) -> None:
    """Write ``diagnostics.json`` and ``parameters.parquet``."""
    (folder / DIAGNOSTICS).write_text(diagnostics.as_json(), encoding="utf-8", newline="\n")
    pq.write_table(parameters, folder / PARAMETERS)
