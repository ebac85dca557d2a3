"""Grouped experts compute what transformers' loop over the experts does, and what cannot be grouped keeps the loop."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from transformers import AriaTextConfig, GptOssConfig, MixtralConfig, NemotronHConfig, PretrainedConfig
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from dualsft.models.experts import group_experts, is_grouped
from tests.cases import make

WIDTH, EXPERTS = 8, 4
_MIXTRAL: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 6, "num_local_experts": EXPERTS}
KINDS: dict[str, Callable[[], tuple[type[nn.Module], PretrainedConfig]]] = {
    "gated": lambda: (MixtralExperts, MixtralConfig(**_MIXTRAL)),
    "biased and transposed": lambda: (GptOssExperts, GptOssConfig(**_MIXTRAL, rope_parameters=None)),
    "transposed": lambda: (AriaExperts, AriaTextConfig(**_MIXTRAL, num_attention_heads=2, moe_num_experts=EXPERTS)),
    "without gates": lambda: (
        NemotronHExperts,
        NemotronHConfig(hidden_size=WIDTH, n_routed_experts=EXPERTS, moe_intermediate_size=6),
    ),
}

CHOSEN = {
    "mixed": [[0, 1], [2, 0], [1, 2], [2, 1], [0, 2], [1, 0]],
    "all to one": [[3]] * 6,
    "one of its own": [[0, 1]] * 5 + [[2, 3]],
    "one expert twice": [[1, 1], [0, 3], [3, 3], [1, 0], [0, 0], [3, 1]],
    "one token": [[2, 0]],
}
"""The experts of each token; those that are not named have none."""


class Model(nn.Module):
    """What `group_experts` takes of a model: modules, and the way to set how their experts are computed."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        build, self.config = KINDS[kind]()
        self.experts: Any = build(self.config)
        torch.manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.double()

    def set_experts_implementation(self, name: str) -> None:
        """As models of transformers do."""
        self.config._experts_implementation = name


def made(kind: str, grouped: bool) -> Any:
    """The experts, grouped or in a loop."""
    model: Any = Model(kind)
    if grouped:
        group_experts(model)
    else:
        model.set_experts_implementation("eager")
    assert is_grouped(model.experts) is grouped
    return model.experts


def inputs_of(chosen: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their experts, and the weights of these."""
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    index = torch.tensor(chosen)
    return draw(len(chosen), WIDTH).requires_grad_(), index, draw(*index.shape).requires_grad_()


def derivatives(experts: Any, chosen: list[list[int]]) -> list[Tensor]:
    """The output, all first derivatives of its energy, and a product of its Hessian with a vector."""
    tokens, index, weights = inputs_of(chosen)
    variables = [tokens, weights, *experts.parameters()]
    output = experts(tokens, index, weights)
    first = torch.autograd.grad(output.square().sum(), variables, create_graph=True)
    second = torch.autograd.grad(first, variables, [torch.ones_like(g) for g in first])
    return [output, *first, *second]


@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=list(CHOSEN))
@pytest.mark.parametrize("kind", KINDS)
def test_grouped_experts_are_those_of_the_loop(kind: str, chosen: list[list[int]]) -> None:
    """Output, first and second derivatives, however the tokens are spread over the experts."""
    pairs = zip(derivatives(made(kind, True), chosen), derivatives(made(kind, False), chosen), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_experts_can_be_differentiated_in_forward_mode(kind: str) -> None:
    """As a module around them is whose output splits where theirs does not."""
    tokens, index, weights = inputs_of(CHOSEN["mixed"])
    found = []
    for grouped in (True, False):
        experts = made(kind, grouped)
        own = {name: p.detach() for name, p in experts.named_parameters()}
        along = {name: torch.ones_like(p) for name, p in own.items()}

        def forward(parameters: dict[str, Tensor], experts: Any = experts) -> Tensor:
            output: Tensor = functional_call(experts, parameters, (tokens.detach(), index, weights.detach()))
            return output

        found.append(jvp(forward, (own,), (along,))[1])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-11)


def test_autocast_multiplies_in_its_type() -> None:
    """As it does the linear layers of a loop, from float32 weights, whose gradients stay in float32."""
    tokens, index, weights = (part.detach() for part in inputs_of(CHOSEN["mixed"]))
    outputs = []
    for grouped in (True, False):
        experts = made("gated", grouped).float()
        with torch.autocast("cpu", torch.bfloat16):
            output = experts(tokens.float(), index, weights.float())
        output.sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in experts.parameters())
        outputs.append(output.detach().double())
    exact = made("gated", False)(tokens, index, weights).detach()
    errors = [float((output - exact).abs().max() / exact.abs().max()) for output in outputs]
    assert 1e-4 < errors[0] < 2 * errors[1]


@pytest.mark.parametrize(
    ("architecture", "grouped"), [("mixtral", 2), ("gpt-oss", 2), ("deepseek v3", 1), ("llama", 0)]
)
def test_experts_of_a_model_are_grouped(architecture: str, grouped: int) -> None:
    """All of them, and nothing else, of models of transformers."""
    model = make(architecture)
    group_experts(model)
    assert sum(map(is_grouped, model.modules())) == grouped


@pytest.mark.parametrize("reason", ["has_post_expert_norm", "_is_expert_parallel"])
def test_experts_that_cannot_be_grouped_keep_the_loop(reason: str) -> None:
    """Those with a norm behind them, and a rank's own."""
    model: Any = Model("gated")
    setattr(model.experts, reason, True)
    group_experts(model)
    assert not is_grouped(model.experts)
    assert model.config._experts_implementation == "eager"
