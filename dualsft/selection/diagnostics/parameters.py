"""The weights' side: one row of ``parameters.parquet`` for each tensor, and the figures of all together.

Beside the scores and the mask of one tensor, memory holds a chunk of it and its histogram.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa
from jaxtyping import Bool, Float
from torch import Tensor

from dualsft.allocators.groups import place_of
from dualsft.selection.diagnostics.figures import ScoreFigures
from dualsft.selection.diagnostics.histogram import CHUNK, ScoreHistogram
from dualsft.selection.diagnostics.levels import LEVELS

QUANTILES = {level: f"score_q{round(100 * level):02d}" for level in LEVELS}
"""Level -> the column of ``parameters.parquet`` with this quantile."""
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("layer", pa.int64()),
        ("kind", pa.string()),
        ("size", pa.int64()),
        ("selected", pa.int64()),
        ("score_sum", pa.float64()),
        ("selected_score_sum", pa.float64()),
        ("magnitude_sum", pa.float64()),
        ("positive_share", pa.float64()),
        *((column, pa.float64()) for column in QUANTILES.values()),
    ]
)


@dataclass(frozen=True)
class TensorFigures:
    """The scores and the mask of one parameter; what only scores tell is None without them.

    Attributes:
        name: The parameter's name.
        size: How many weights it has.
        selected: How many are chosen.
        score_sum: Σ φ_j.
        selected_score_sum: Σ φ_j over the chosen ones.
        magnitude_sum: Σ |φ_j|.
        positive_share: The share of the weights with a positive score.
        quantiles: Of the scores, to 2^-7 of their size.
    """

    name: str
    size: int
    selected: int
    score_sum: float | None = None
    selected_score_sum: float | None = None
    magnitude_sum: float | None = None
    positive_share: float | None = None
    quantiles: Mapping[str, float] | None = None


class _Total:
    """The figures of all weights together, tensor after tensor."""

    def __init__(self) -> None:
        self.histogram = ScoreHistogram()
        self.selected = self.selected_positive = 0
        self.score_sum = self.captured = 0.0

    def figures(self) -> ScoreFigures:
        all_, positive = self.histogram, self.histogram.positive_sum
        return ScoreFigures(
            scored=all_.count,
            selected=self.selected,
            selected_positive=self.selected_positive,
            score_sum=self.score_sum,
            positive_share=all_.positive / all_.count if all_.count else 0.0,
            positive_sum=positive,
            captured=min(1.0, self.captured / positive) if positive > 0 else None,
            quantiles=all_.quantiles(),
            capture=all_.capture(),
            capture_by_magnitude=all_.capture_by_magnitude(),
        )


def parameter_figures(
    masks: Mapping[str, Tensor], scores: Mapping[str, Tensor]
) -> tuple[list[TensorFigures], ScoreFigures | None]:
    """Look at each tensor once.

    Args:
        masks: Parameter name -> which weights are chosen; each may be made when it is read.
        scores: Parameter name -> φ_j, of the same shape; empty where no weight was scored.

    Returns:
        The figures of each parameter, by name, and of all together; None for these without scores.
    """
    total, tensors = _Total(), []
    for name in sorted(masks):
        mask = masks[name].flatten()
        if name in scores:
            tensors.append(_scored(name, scores[name].flatten(), mask, total))
        else:
            tensors.append(TensorFigures(name, len(mask), int(mask.count_nonzero())))
    return tensors, total.figures() if scores else None


def _scored(name: str, scores: Float[Tensor, " weight"], mask: Bool[Tensor, " weight"], total: _Total) -> TensorFigures:
    histogram, selected, held = ScoreHistogram(), 0, 0.0
    for part, chosen in _chunks(scores, mask):
        histogram.add(part)
        taken = part[chosen].double()
        selected, held = selected + len(taken), held + float(taken.sum())
        positive = taken[taken > 0]
        total.selected_positive += len(positive)
        total.captured += float(positive.sum())
    score_sum = float(histogram.sums.sum())
    total.histogram.merge(histogram)
    total.selected, total.score_sum = total.selected + selected, total.score_sum + score_sum
    return TensorFigures(
        name,
        len(scores),
        selected,
        score_sum,
        held,
        magnitude_sum=2 * histogram.positive_sum - score_sum,
        positive_share=histogram.positive / len(scores) if len(scores) else 0.0,
        quantiles=histogram.quantiles() or None,
    )


def _chunks(scores: Float[Tensor, " weight"], mask: Bool[Tensor, " weight"]) -> Iterator[tuple[Tensor, Tensor]]:
    for first in range(0, len(scores), CHUNK):
        yield scores[first : first + CHUNK].cpu().float(), mask[first : first + CHUNK].cpu()


def parameter_table(tensors: list[TensorFigures]) -> pa.Table:
    """The table with the columns of `SCHEMA`."""
    rows = []
    for of in tensors:
        layer, kind = place_of(of.name)
        quantiles = {column: (of.quantiles or {}).get(str(level)) for level, column in QUANTILES.items()}
        rows.append(
            {**{k: v for k, v in vars(of).items() if k != "quantiles"}, "layer": layer, "kind": kind} | quantiles
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


@dataclass(frozen=True)
class WeightFigures:
    """The weights' side of the diagnostics.

    Attributes:
        table: One row for each tensor, with the columns of `SCHEMA`.
        together: The figures of all weights; None where none was scored.
    """

    table: pa.Table
    together: ScoreFigures | None


def weight_figures(masks: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> WeightFigures:
    """The figures of masks and scores; the arguments are those of `parameter_figures`."""
    tensors, together = parameter_figures(masks, scores)
    return WeightFigures(parameter_table(tensors), together)


def tensors_of(table: pa.Table) -> list[TensorFigures]:
    """The rows of ``parameters.parquet``; the inverse of `parameter_table`."""
    return [_tensor(row) for row in table.to_pylist()]


def _tensor(row: Mapping[str, Any]) -> TensorFigures:
    quantiles = {str(level): row[column] for level, column in QUANTILES.items() if row[column] is not None}
    plain = [of.name for of in fields(TensorFigures) if of.name != "quantiles"]
    return TensorFigures(**{name: row[name] for name in plain}, quantiles=quantiles or None)
