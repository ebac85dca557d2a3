"""All diagnostics of a choice, and the two files that keep them beside it."""

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from dualsft.selection.diagnostics.examples import Rows, example_figures, length_figures, source_figures
from dualsft.selection.diagnostics.figures import Basis, Diagnostics
from dualsft.selection.diagnostics.parameters import parameter_figures, parameter_table
from dualsft.selection.diagnostics.rows import RowSources

DIAGNOSTICS, PARAMETERS = "diagnostics.json", "parameters.parquet"


def diagnose(
    examples: pa.Table,
    masks: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    sources: RowSources | None,
    basis: Basis,
) -> tuple[Diagnostics, pa.Table]:
    """Compute the diagnostics, and the table of the parameters with the columns of `SCHEMA`.

    Args:
        examples: The table of ``examples.parquet``.
        masks: Parameter name -> which weights are chosen; each may be made when it is read.
        scores: Parameter name -> φ_j, likewise; empty where no weight was scored.
        sources: The sources of the rows, if they are known.
        basis: What the scores rest on.
    """
    rows = Rows(examples)
    tensors, together = parameter_figures(masks, scores)
    by_source = source_figures(rows, sources) if sources else None
    figures = Diagnostics(example_figures(rows), together, length_figures(rows), by_source, basis)
    return figures, parameter_table(tensors)


def write_diagnostics(folder: Path, diagnostics: Diagnostics, parameters: pa.Table) -> None:
    """Write ``diagnostics.json`` and ``parameters.parquet``."""
    (folder / DIAGNOSTICS).write_text(diagnostics.as_json(), encoding="utf-8", newline="\n")
    pq.write_table(parameters, folder / PARAMETERS)
