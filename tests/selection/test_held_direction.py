"""Directions held in the weights' own type, and what the scores are made of."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualsft.errors import UserError
from dualsft.models.dtypes import accumulator_dtype
from dualsft.models.lazy import LazyTensors
from dualsft.paths import TargetPath
from dualsft.scorers import DiagonalFisher
from dualsft.selection import held_direction
from dualsft.selection.held_direction import HeldDirection
from dualsft.selection.paths.settings import PathSettings
from tests.world.jobs import SGD, Inputs, select, write_inputs


def weight_of(dtype: torch.dtype) -> nn.Module:
    """A model of one weight."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1000, dtype=dtype))
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_only_what_is_rounded_is_made_again(dtype: torch.dtype) -> None:
    """It is held in bfloat16 for bfloat16, and else in the type of sums; exact, it is in the type of sums always."""
    reads: list[None] = []

    def make(_: str) -> Tensor:
        reads.append(None)
        return torch.linspace(-1e-9, 3e-8, 1000, dtype=accumulator_dtype(weight))

    model = weight_of(dtype)
    weight = model.get_parameter("weight")
    u = HeldDirection(LazyTensors(["weight"], make), model)
    narrow = dtype == torch.bfloat16
    assert u.held["weight"].dtype == (dtype if narrow else accumulator_dtype(weight))
    assert torch.equal(u.exact["weight"], make(""))
    assert len(reads) == (3 if narrow else 2)


def test_a_direction_that_changes_is_refused() -> None:
    """Rows by one direction and columns by another would be no scores at all; nothing else would tell."""
    u = HeldDirection(LazyTensors(["weight"], lambda _: torch.randn(1000)), weight_of(torch.bfloat16))
    with pytest.raises(UserError, match="direction of weight is another one when it is computed again"):
        u.exact["weight"]


CASES: dict[str, dict[str, Any]] = {
    "first order": SGD,
    "diagonal fisher, weights then examples": {
        **SGD,
        "scorer": DiagonalFisher("empirical_fisher"),
        "order": "parameters_then_data",
    },
    "along the target": {**SGD, "path": PathSettings(along=TargetPath(), pieces=1, epochs=1, learning_rate=1e-2)},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Of a bfloat16 model, with examples too short for products with dW_i."""
    return write_inputs(tmp_path_factory.mktemp("bfloat16"), dtype=torch.bfloat16)


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_a_float32_direction(
    case: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both score vectors of a bfloat16 model are, bit for bit, those of directions held in float32."""
    options = {**CASES[case], "dtype": "bfloat16", "step_size": 2e-5}
    narrow = select(inputs, tmp_path / "narrow", options)
    monkeypatch.setattr(held_direction, "direction_dtype", accumulator_dtype)
    wide = select(inputs, tmp_path / "wide", options)
    assert narrow.examples["score"] == wide.examples["score"]
    expected = wide.parameter_scores()
    for name, score in narrow.parameter_scores().items():
        assert torch.equal(score, expected[name])
        assert not torch.equal(score, score.bfloat16().float())
