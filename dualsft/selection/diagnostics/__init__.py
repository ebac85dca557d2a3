"""What a finished choice looks like: from scores, masks and counts alone, without a model.

In: the table of examples, the scores and masks of the weights one tensor after another, and the sources of the rows.
Out: ``diagnostics.json`` as `Diagnostics`, and the rows of ``parameters.parquet``.
"""

from dualsft.selection.diagnostics.diagnose import DIAGNOSTICS, PARAMETERS, diagnose, write_diagnostics
from dualsft.selection.diagnostics.figures import (
    Alignment,
    Basis,
    Diagnostics,
    LengthBin,
    Lengths,
    ScoreFigures,
    SourceGroup,
    Sources,
    Stability,
    Target,
)
from dualsft.selection.diagnostics.levels import LEVELS
from dualsft.selection.diagnostics.parameters import WeightFigures, weight_figures
from dualsft.selection.diagnostics.places import ALL, PlaceCounts, by_place
from dualsft.selection.diagnostics.rows import RowSources, describe_target, row_sources

__all__ = [
    "ALL",
    "DIAGNOSTICS",
    "LEVELS",
    "PARAMETERS",
    "Alignment",
    "Basis",
    "Diagnostics",
    "LengthBin",
    "Lengths",
    "PlaceCounts",
    "RowSources",
    "ScoreFigures",
    "SourceGroup",
    "Sources",
    "Stability",
    "Target",
    "WeightFigures",
    "by_place",
    "describe_target",
    "diagnose",
    "row_sources",
    "weight_figures",
    "write_diagnostics",
]
