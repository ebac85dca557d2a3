"""Scores by token of a few examples, computed after the selection."""

from pathlib import Path
from typing import Any

import pytest

from dualsft import SelectionModule, UserError
from dualsft.runs.folder import RunFolder
from dualsft.scorers import HessianVector
from tests.world.jobs import ADAM, SGD, Inputs, select, trainer

SECOND_ORDER = {**SGD, "scorer": HessianVector(), "step_size": 1e-2}


@pytest.mark.parametrize("options", [ADAM, SECOND_ORDER], ids=["adam", "second order"])
def test_they_are_those_that_select_would_have_kept(inputs: Inputs, options: dict[str, Any], tmp_path: Path) -> None:
    """The same tokens and the same shares of the score: after a warm-up, and for a scorer that needs ḡ of the pool."""
    kept = select(inputs, tmp_path / "kept", {**options, "token_scores": True}).token_scores
    assert kept is not None
    module = SelectionModule(inputs.model, **options)
    found = trainer(precision="32-true").score_tokens(module, inputs.data(), RunFolder(tmp_path / "run"), [0, 7], 0)
    expected = {row["example_id"]: row for row in kept.to_pylist()}
    assert sorted(found) == [0, 7]
    for i, (ids, scores) in found.items():
        assert ids == expected[i]["token_id"]
        size = max(map(abs, expected[i]["score"]))
        assert scores == pytest.approx(expected[i]["score"], rel=1e-4, abs=1e-5 * size)


def test_what_has_no_such_scores_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    """Scores that rest on more than θ and u are not told by token afterwards."""
    module = SelectionModule(inputs.model, **{**SGD, "normalize": "tokens"})
    with pytest.raises(UserError, match=r"make the selection again with model\.token_scores"):
        trainer(precision="32-true").score_tokens(module, inputs.data(), RunFolder(tmp_path / "run"), [0], 0)
