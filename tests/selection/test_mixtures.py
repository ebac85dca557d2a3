"""A selection on a mixture of experts, which are grouped, is that of a loop over the experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from dualsft import SelectionModule
from dualsft.models.experts import is_grouped
from dualsft.scorers import DiagonalFisher, HessianVector
from dualsft.selection import Selection, module
from dualsft.selection.prior import Prior
from tests.world.jobs import ADAM, SGD, Inputs, select, write_inputs
from tests.world.models import tiny_llama

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "curvature and prior": (
        {**SGD, "scorer": HessianVector(), "step_size": 1e-2, "prior": Prior(weight=0.5, fraction=0.5)},
        {},
    ),
    "squared gradients behind a warm-up": (
        {**ADAM, "scorer": DiagonalFisher("empirical_fisher"), "step_size": 0.1},
        {},
    ),
    "tokens of packed examples": ({**SGD, "token_scores": True, "gradient_checkpointing": True}, {"packing": True}),
}
"""Options of the selection, and of its data."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A mixture of the size of the tiny Llama, and that one's data."""
    found = write_inputs(tmp_path_factory.mktemp("inputs"))
    fields = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "initializer_range")
    sizes = {name: getattr(tiny_llama().config, name) for name in (*fields, "pad_token_id", "eos_token_id")}
    torch.manual_seed(0)
    config = MixtralConfig(**sizes, intermediate_size=24, num_key_value_heads=2, num_local_experts=4)
    MixtralForCausalLM(config).save_pretrained(found.model)
    return found


def in_a_loop(model: PreTrainedModel) -> None:
    """As before experts were grouped."""
    model.set_experts_implementation("eager")


def test_experts_are_grouped_where_they_are_scored(inputs: Inputs) -> None:
    """Of the scoring checkpoint and of the base model beside it; the configuration that is written does not tell."""
    selection = SelectionModule(inputs.model, **SGD)
    selection.configure_model()
    for model in (selection.model, selection.load_base()):
        assert sum(map(is_grouped, model.modules())) == 2
        assert "dualsft" not in model.config.to_json_string()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_selection_is_that_of_a_loop(
    name: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, both kinds of scores, up to its rounding."""
    options, data = CASES[name]
    grouped = select(inputs, tmp_path / "grouped", options, data)
    monkeypatch.setattr(module, "group_experts", in_a_loop)
    looped = select(inputs, tmp_path / "looped", options, data)
    torch.testing.assert_close(_of_examples(grouped), _of_examples(looped), rtol=1e-4, atol=1e-8)
    expected = looped.parameter_scores()
    for weights, scores in grouped.parameter_scores().items():
        largest = float(expected[weights].abs().max())
        torch.testing.assert_close(scores, expected[weights], rtol=0.0, atol=1e-4 * largest, msg=weights)


def _of_examples(selection: Selection) -> torch.Tensor:
    scores = selection.examples["score"].to_pylist()
    return torch.tensor([score for score in scores if score is not None], dtype=torch.float64)
