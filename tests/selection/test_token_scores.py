"""Scores by token: what is written, that it adds up, and what is shown."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dualsft.errors import UserError
from dualsft.selection import Selection
from dualsft.selection.artifact import load_selection
from dualsft.selection.summary import summary
from tests.world.damage import forget_checksums
from tests.world.data import OK
from tests.world.jobs import SGD, Inputs, select
from tests.world.models import tiny_tokenizer


@pytest.fixture(scope="module")
def with_tokens(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Selection:
    """A selection with scores by token."""
    return select(inputs, tmp_path_factory.mktemp("tokens"), {**SGD, "token_scores": True})


def test_token_scores_add_up_to_the_example_scores(inputs: Inputs, with_tokens: Selection) -> None:
    """One row per scored example, one score per token of it, and their sum is the example's score."""
    table = with_tokens.token_scores
    assert table is not None
    scores = dict(zip(*with_tokens.examples.select(["example_id", "score"]).to_pydict().values(), strict=True))
    examples = inputs.examples("train")
    assert table["example_id"].to_pylist() == OK
    for row in table.to_pylist():
        assert row["token_id"] == examples[row["example_id"]][0]
        assert len(row["score"]) == len(row["token_id"])
        assert row["supervised"] == [label != -100 for label in examples[row["example_id"]][1]]
        assert sum(row["score"]) == pytest.approx(scores[row["example_id"]], rel=1e-12)


def test_token_scores_change_nothing_else(inputs: Inputs, with_tokens: Selection, tmp_path: Path) -> None:
    """Example scores are those of a selection without them, and nothing is written where they are not asked for."""
    without = select(inputs, tmp_path / "out", SGD)
    assert without.token_scores is None
    assert not (tmp_path / "out" / "token_scores.parquet").exists()
    found, expected = (s.examples["score"].to_pylist() for s in (with_tokens, without))
    assert found == [value if value is None else pytest.approx(value, rel=1e-4, abs=1e-12) for value in expected]


def test_the_summary_spells_the_telling_tokens(with_tokens: Selection) -> None:
    """The best examples come with their best tokens, spelt, and each token's share of the score."""
    lines = summary(with_tokens, tiny_tokenizer()).splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("tokens"))
    scores = with_tokens.examples["score"].to_pylist()
    best = max(OK, key=lambda i: scores[i])
    assert lines[first + 1].startswith(f"  example {best} ({scores[best]:.3g})  '")
    assert "%" in lines[first + 1]
    assert "tokens      that" not in summary(with_tokens)


def test_a_table_of_other_columns_is_refused(with_tokens: Selection, tmp_path: Path) -> None:
    """A table that an editor has changed is refused by its name."""
    shutil.copytree(with_tokens.folder, tmp_path / "s")
    forget_checksums(tmp_path / "s")
    pq.write_table(pa.table({"example_id": ["0"]}), tmp_path / "s" / "token_scores.parquet")
    with pytest.raises(UserError, match=r"token_scores\.parquet is damaged: it has no column example_id of int64"):
        _ = load_selection(tmp_path / "s").token_scores
