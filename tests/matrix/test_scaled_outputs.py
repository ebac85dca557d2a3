"""Norms scale by their weight: their share is found from their output."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualsft.matrix.module_call import ModuleCall
from dualsft.matrix.passes import gradient_pass
from dualsft.selection.passes import scoring_mode
from tests.cases import collate, given, make, make_examples, pack, random_direction
from tests.references import assert_rows, float64_throughout, gradient_loop

EXAMPLES = make_examples()
TWICE = list(range(len(EXAMPLES), 2 * len(EXAMPLES)))


class Scaled(nn.Module):
    """The input times a weight, in one of several ways."""

    def __init__(self, width: int, way: Callable[[Tensor], Tensor] = lambda weight: weight) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
        self._way = way

    def forward(self, x: Tensor) -> Tensor:
        """The product, of another type than any norm's."""
        return torch.tanh(x) * self._way(self.weight)


def with_a_zero(width: int) -> nn.Module:
    """One whose weight has a zero, behind which the input cannot be seen."""
    module = Scaled(width)
    module.weight.data[1] = 0
    return module


def modified(width: int) -> nn.Module:
    """One whose output the model modifies in place."""
    module = Scaled(width)
    module.register_forward_hook(lambda _module, _inputs, output: output.mul_(2))
    return module


KINDS: dict[str, tuple[Callable[[int], nn.Module], bool]] = {
    "scaled": (Scaled, True),
    "mirrored": (lambda width: Scaled(width, lambda weight: weight.flip(0)), False),
    "cumulated": (lambda width: Scaled(width, lambda weight: weight.cumsum(0)), False),
    "a zero": (with_a_zero, False),
    "modified": (modified, True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"columns": False}, {"by_token": True}], ids=["both", "rows", "by token"])
def test_every_batch_has_the_same_rows(kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd's over single examples, whatever the module makes of its weight, also where its output is modified."""
    found: list[bool] = []
    scales = ModuleCall.scales

    def noted(call: ModuleCall, names: Any) -> bool:
        is_scaled = scales(call, names)
        if isinstance(call._module, Scaled):
            found.append(is_scaled)
        return is_scaled

    monkeypatch.setattr(ModuleCall, "scales", noted)
    make_module, is_scaled = KINDS[kind]
    with float64_throughout():
        model = make("llama")
        for layer in model.model.layers:
            layer.post_attention_layernorm = make_module(model.config.hidden_size)
        expected, u = gradient_loop(model, EXAMPLES), random_direction(model)
        batches = [collate(EXAMPLES), pack([[0, 1], [2, 4], [3]], EXAMPLES), collate(EXAMPLES)]
        batches[1]["example_id"] += len(EXAMPLES)
        batches[2]["example_id"] += 2 * len(EXAMPLES)
        rows = gradient_pass(model, given(batches), directions=[u], **options).rows[0]
    count = sum(isinstance(module, Scaled) for module in model.modules())
    assert found == [is_scaled] * count
    for first in range(0, len(rows), len(EXAMPLES)):
        assert_rows([rows[first + k] for k in range(len(EXAMPLES))], u, expected, 1e-12)


def test_recomputed_layers_keep_as_many_tensors() -> None:
    """One norm in all places, some of which are computed again when its share in others has been found."""
    with float64_throughout():
        model = make("llama")
        shared = model.model.layers[0].input_layernorm
        for layer in model.model.layers:
            layer.input_layernorm = layer.post_attention_layernorm = shared
        expected, u = gradient_loop(model, EXAMPLES), random_direction(model)
        with scoring_mode(model, checkpointing=True):
            batches = [collate(EXAMPLES), collate(EXAMPLES, TWICE)]
            rows = gradient_pass(model, given(batches), directions=[u]).rows[0]
    for first in (0, len(EXAMPLES)):
        assert_rows([rows[first + k] for k in range(len(EXAMPLES))], u, expected, 1e-12)
