"""The comparison with another tool: what the retraining trains on, and how scores and tables are read and written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peer_removal import Training, batches, drawn, highest, interval
from peer_tables import markdown
from peer_tools import lowered_scores, stored_products, written_scores


def test_removal_changes_nothing_else() -> None:
    """The other rows keep their order within a pass, and steps keep their number and size."""
    training, removed = Training(steps=5, batch=4, rate=0.1), {1, 7}
    whole, rest = ([i for ids in batches(10, gone, training, 3) for i in ids] for gone in (set(), removed))
    assert len(whole) == len(rest) == 20
    assert sorted(whole[:10]) == list(range(10))
    assert [i for i in whole[:10] if i not in removed] == rest[:8]


def test_what_is_removed() -> None:
    """The highest scores, or as many rows at random, and one row at least."""
    scores = torch.tensor([0.5, -3.0, 2.0, 1.0])
    assert highest(scores, 0.5) == {2, 3}
    assert highest(scores, 0.01) == {2}
    assert len(drawn(50, 0.1, seed=0)) == 5
    assert drawn(50, 0.1, seed=0) != drawn(50, 0.1, seed=1)


def test_interval_is_students() -> None:
    """Of three values, 4.303 standard errors to each side."""
    middle, half = interval([1.0, 2.0, 3.0])
    assert middle == 2.0
    assert half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)


def test_scores_as_bergson_writes_them(tmp_path: Path) -> None:
    """A table of records with their layout beside it; a tool whose scores are low for what helps is turned round."""
    layout: Any = {"names": ["score_0", "written_0"], "formats": ["float32", "bool"], "offsets": [0, 4], "itemsize": 8}
    table = np.array([(1.0, True), (-2.0, True), (0.5, True)], np.dtype(layout))
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "info.json").write_text(json.dumps({"dtype": layout}))
    table.tofile(tmp_path / "scores" / "scores.bin")
    assert written_scores(tmp_path).tolist() == [1.0, -2.0, 0.5]
    assert lowered_scores(tmp_path).tolist() == [-1.0, 2.0, -0.5]


def test_products_of_stored_gradients(tmp_path: Path) -> None:
    """Each row of the store with the query's only row."""
    for name, rows in (("query", [[1.0, 2.0]]), ("store", [[3.0, 0.0], [1.0, 1.0]])):
        (tmp_path / name).mkdir()
        np.array(rows, np.float32).tofile(tmp_path / name / "gradients.bin")
        (tmp_path / name / "info.json").write_text(json.dumps({"base_dtype": "float32", "num_grads": len(rows)}))
    assert stored_products(tmp_path).tolist() == [3.0, 3.0]


def test_tables_have_the_columns_of_all_lines() -> None:
    """A line without a figure has an empty cell; lists of figures are means with intervals."""
    found = markdown([{"setting": "a", "n": 1234}, {"setting": "b", "rises, 1%": [1.0, 2.0, 3.0]}])
    assert found.splitlines()[2:] == ["| a | 1,234 |  |", "| b |  | +2.000 ± 2.484 |"]
