from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dualsft.selection.diagnostics import RowSources, examples
from dualsft.selection.diagnostics.examples import (
    Rows,
    example_figures,
    length_figures,
    rank_correlation,
    source_figures,
)

SCORES = [0.5, None, -1.0, 2.0, 0.0, None, 3.5]
TOKENS = [1, 0, 2, 3, 4, 9, 8]
SELECTED = [False, False, True, True, False, False, True]


def rows(scores: list[float | None] = SCORES, **columns: Any) -> Rows:
    """A small table of examples."""
    table = {"score": scores, "num_tokens": TOKENS[: len(scores)], "selected": SELECTED[: len(scores)], **columns}
    return Rows(pa.table({**table, "score": pa.array(table["score"], pa.float64())}))


def test_figures_of_the_scores() -> None:
    """Rows without a score do not count; of 6.0 in positive scores the chosen hold 5.5."""
    found = example_figures(rows())
    assert (found.scored, found.selected, found.selected_positive, found.score_sum) == (5, 3, 2, 5.0)
    assert (found.positive_share, found.positive_sum, found.captured) == (0.6, 6.0, 5.5 / 6)
    assert (found.quantiles["0.0"], found.quantiles["0.5"], found.quantiles["1.0"]) == (-1.0, 0.5, 3.5)
    assert (found.capture[0], found.capture[39], found.capture[59], found.capture[-1]) == (3.5 / 6, 5.5 / 6, 1, 1)
    assert len(found.capture) == 100


def test_scores_that_are_not_positive_capture_nothing() -> None:
    """Neither is there a share of what is not there."""
    found = example_figures(rows([-1.0, 0.0, -2.0]))
    assert (found.capture, found.captured, found.positive_share) == ([], None, 0.0)


def test_every_row_is_of_one_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups come by their size, rare ones together at the end; they add up to the table."""
    monkeypatch.setattr(examples, "MOST_SOURCES", 2)
    found = source_figures(rows(), RowSources("source", ("a", "b", "b", "c", "b", "a", "d")))
    assert [(g.name, g.rows, g.scored, g.selected) for g in found.groups] == [
        ("b", 3, 2, 1),
        ("a", 2, 1, 0),
        (None, 2, 2, 2),
    ]
    assert sum(g.tokens for g in found.groups) == sum(TOKENS)
    assert sum(g.selected_tokens for g in found.groups) == 2 + 3 + 8
    assert sum(g.score_sum for g in found.groups) == 5.0


def test_lengths_are_in_bins_of_powers_of_two() -> None:
    """1, 2 to 3, 4 to 7, 8 to 15; a row without supervised tokens is in none."""
    found = length_figures(rows())
    assert [(b.shortest, b.longest, b.rows, b.scored, b.selected) for b in found.bins] == [
        (1, 1, 1, 1, 0),
        (2, 3, 2, 2, 2),
        (4, 7, 1, 1, 0),
        (8, 15, 2, 1, 1),
    ]
    assert (found.pool["0.5"], found.selected["0.5"]) == (3, 3)
    assert (found.pool_tokens, found.selected_tokens) == (18, 13)


def test_rank_correlation_of_length_and_score() -> None:
    """It is the correlation of the ranks, and none where either side is the same everywhere."""
    length, score = np.array([1, 2, 3, 4, 8]), np.array([0.5, -1.0, 2.0, 0.0, 3.5])
    ranks = np.argsort(np.argsort(np.stack([length, score])))
    due: Any = np.corrcoef(ranks)
    assert rank_correlation(length, score) == pytest.approx(due[0, 1])
    assert rank_correlation(length, np.zeros(5)) is None
    assert rank_correlation(length[:2], score[:2]) is None
