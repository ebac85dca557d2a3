"""The examples' side: the figures of their scores, and the rows by source and by length; all exact."""

import math
from collections import Counter

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from dualsft.selection.diagnostics.figures import (
    LengthBin,
    Lengths,
    ScoreFigures,
    SourceGroup,
    Sources,
)
from dualsft.selection.diagnostics.levels import budget_counts, quantiles
from dualsft.selection.diagnostics.rows import RowSources

MOST_SOURCES = 100
"""Sources that are listed; the others are one group."""


class Rows:
    """The table of examples as arrays.

    Attributes:
        score: φ_i; NaN where there is none.
        scored: Whether there is a score.
        selected: Whether the row is chosen.
        tokens: Supervised tokens.
    """

    def __init__(self, examples: pa.Table) -> None:
        self.score: Float[np.ndarray, " row"] = examples["score"].to_numpy()
        self.scored: Bool[np.ndarray, " row"] = ~np.isnan(self.score)
        self.selected: Bool[np.ndarray, " row"] = examples["selected"].to_numpy()
        self.tokens: Int[np.ndarray, " row"] = examples["num_tokens"].to_numpy()


def example_figures(rows: Rows) -> ScoreFigures:
    """The figures of the examples' scores, and what was chosen."""
    scores = rows.score[rows.scored]
    positive = np.clip(scores, 0, None)
    total = math.fsum(positive)
    held = math.fsum(np.clip(rows.score[rows.scored & rows.selected], 0, None))
    return ScoreFigures(
        scored=len(scores),
        selected=int(rows.selected.sum()),
        selected_positive=int((rows.score[rows.selected] > 0).sum()),
        score_sum=math.fsum(scores),
        positive_share=float((scores > 0).mean()) if len(scores) else 0.0,
        positive_sum=total,
        captured=held / total if total > 0 else None,
        quantiles=quantiles(scores),
        capture=_capture(positive, total),
    )


def _capture(positive: Float[np.ndarray, " example"], total: float) -> list[float]:
    if not total > 0:
        return []
    held = np.minimum(np.cumsum(np.sort(positive)[::-1]) / total, 1.0)
    return [float(held[count - 1]) for count in budget_counts(len(positive))]


def source_figures(rows: Rows, sources: RowSources) -> Sources:
    """The rows of each source, the most frequent first; those beyond `MOST_SOURCES` together at the end."""
    counts = Counter(sources.names).most_common()
    listed: dict[str | None, int] = {name: place for place, (name, _) in enumerate(counts[:MOST_SOURCES])}
    groups = [name for name, _ in counts[:MOST_SOURCES]]
    names: list[str | None] = [*groups, None] if len(counts) > MOST_SOURCES else [*groups]
    place = np.array([listed.get(name, MOST_SOURCES) for name in sources.names])
    return Sources(sources.column, [_group(name, rows, place == k) for k, name in enumerate(names)])


def _group(name: str | None, rows: Rows, of: Bool[np.ndarray, " row"]) -> SourceGroup:
    return SourceGroup(
        name,
        rows=int(of.sum()),
        scored=int((of & rows.scored).sum()),
        selected=int((of & rows.selected).sum()),
        tokens=int(rows.tokens[of].sum()),
        selected_tokens=int(rows.tokens[of & rows.selected].sum()),
        score_sum=math.fsum(rows.score[of & rows.scored]),
    )


def length_figures(rows: Rows) -> Lengths:
    """The rows by length, in bins from one power of two to the next; a row without supervised tokens is in none."""
    exponent = np.frexp(rows.tokens.astype(float))[1] - 1  # of the power of two below
    bins = []
    for power in range(int(exponent[rows.tokens > 0].max(initial=-1)) + 1):
        of = (rows.tokens > 0) & (exponent == power)
        counts = (of.sum(), (of & rows.scored).sum(), (of & rows.selected).sum())
        bins.append(LengthBin(2**power, 2 ** (power + 1) - 1, *map(int, counts)))
    pool, chosen = rows.tokens[rows.scored], rows.tokens[rows.selected]
    return Lengths(
        bins,
        pool=quantiles(pool),
        selected=quantiles(chosen),
        pool_tokens=int(pool.sum()),
        selected_tokens=int(chosen.sum()),
        correlation=rank_correlation(pool, rows.score[rows.scored]),
    )


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Spearman's rank correlation; None where either is the same everywhere, or there are fewer than three."""
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    from scipy.stats import spearmanr  # slow to import

    return float(spearmanr(one, other).statistic)
