"""A selection over packed rows is the selection over padded ones."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from dualsft.errors import UserError
from tests.world.jobs import ADAM, SGD, Inputs, select


@pytest.mark.parametrize("options", [SGD, {**SGD, "token_scores": True}, {**SGD, "gradient_checkpointing": True}])
def test_packed_scores_are_the_padded_ones(inputs: Inputs, tmp_path: Path, options: dict[str, Any]) -> None:
    """Scores agree within rounding, the same examples are chosen, and both say how much of a batch is padding."""
    padded = select(inputs, tmp_path / "padded", SGD)
    packed = select(inputs, tmp_path / "packed", options, {"packing": True})
    found, expected = (s.examples["score"].to_pylist() for s in (packed, padded))
    assert found == [value if value is None else pytest.approx(value, rel=1e-4, abs=1e-12) for value in expected]
    assert packed.example_ids == padded.example_ids
    shares = [s.manifest["data"]["padding_share"] for s in (packed, padded)]
    assert 0 <= shares[0] < shares[1] < 1
    assert packed.manifest["data"]["packing"] is True


def test_a_packed_warm_up_runs(inputs: Inputs, tmp_path: Path) -> None:
    """The warm-up trains on packed rows too, and the sum identity holds after it."""
    selection = select(inputs, tmp_path / "out", ADAM, {"packing": True})
    assert selection.manifest["phases"][0]["name"] == "warm-up"
    assert selection.manifest["phases"][0]["examples"] == 8
    assert selection.manifest["sum_identity"]["relative_difference"] < 1e-5


def test_a_model_that_mixes_packed_examples_is_refused_before_work(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves no trace in the output folder."""
    forward = LlamaForCausalLM.forward
    deaf = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(LlamaForCausalLM, "forward", deaf)
    with pytest.raises(UserError, match=r"lets packed examples see one another.*; set data.packing to false"):
        select(inputs, tmp_path / "out", SGD, {"packing": True})
    assert not (tmp_path / "out").exists()
