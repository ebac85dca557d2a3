"""Scores are exact whatever the architecture: rows and columns of a batch are autograd's over single examples."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dualsft.data.layout import Batch
from dualsft.errors import UserError
from dualsft.matrix import interaction, tap
from dualsft.matrix import passes as gradients
from dualsft.matrix.linear_tap import LinearTap
from dualsft.matrix.module_call import ModuleCall
from dualsft.matrix.pass_result import GradientPass
from dualsft.matrix.passes import gradient_pass
from dualsft.objectives import example_losses
from dualsft.objectives.tail import body_path
from tests.cases import (
    ARCHITECTURES,
    Gradients,
    chunks_of,
    collate,
    gemma3n,
    given,
    make,
    make_examples,
    pack,
    random_direction,
)
from tests.references import assert_rows, assert_same_gradients, float64_throughout, gradient_loop, total

EXAMPLES = make_examples()
FLOAT64, FLOAT32 = 1e-12, 1e-5
"""How near to float64 autograd, relative to the numbers that are added."""

FORGETFUL = {"gpt-oss", "opt", "bloom", "bert", "rwkv", "lfm2", "mamba"}
"""What lets packed examples see one another: other positions than ids, a state, or attention that is not told."""


@cache
def reference(architecture: str) -> list[Gradients]:
    """Autograd over one unpadded example at a time, and over one expert at a time, float64 all through."""
    model = make(architecture)
    model.set_experts_implementation("eager")
    with float64_throughout():
        return gradient_loop(model, EXAMPLES)


WAYS = {"by gradient": (0.0, 0.0), "by product": (1e9, 0.0)}
"""Linear layers take one way to the rows, whatever the lengths."""


@contextmanager
def by(way: str) -> Iterator[None]:
    """Linear layers take this way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dualsft.matrix.linear_tap._BREAK_EVEN", {"cpu": WAYS[way], "cuda": WAYS[way]})
        yield


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way."""
    with by(request.param):
        yield request.param


def assert_scores(
    model: PreTrainedModel,
    batch: Batch,
    expected: list[Gradients],
    relative: float,
    again: Batch | None = None,
    **options: Any,
) -> GradientPass:
    """A pass over one batch covers every weight, and finds the rows and the columns of these gradients.

    So it does over another one of the same examples, for which it knows the model's modules.
    """
    u, batches, count = random_direction(model), [batch], len(expected)
    if again is not None:
        batches.append({**again, "example_id": again["example_id"] + count})
    found = gradient_pass(model, given(batches), directions=[u], **options)
    assert found.covered == set(u)
    for first in range(0, len(batches) * count, count):
        assert_rows([found.rows[0][first + k] for k in range(count)], u, expected, relative)
    if found.sums:
        assert_same_gradients(found.sums, total(expected * len(batches)), relative)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_autograd(architecture: str) -> None:
    """Rows and columns of one batch are those of autograd over unpadded single examples, in float64.

    So are they where the batch is packed, for rows alone, from frozen weights, and for an example's own tokens, which
    add up to its row; the same weights in float32 score the same but for rounding. All but the first have their losses
    in chunks.
    """
    model, expected, padded = make(architecture), reference(architecture), collate(EXAMPLES)
    with float64_throughout():
        with by("by product"):
            assert_scores(model, padded, expected, FLOAT64)
        with chunks_of(4):
            with by("by gradient"):
                assert_scores(model, padded, expected, FLOAT64)
            if architecture not in {*FORGETFUL, "falcon"}:
                assert_scores(model, pack([[0, 3, 1], [2], [4]], EXAMPLES), expected, FLOAT64)
            assert_scores(model, padded, expected, FLOAT64, padded, columns=False)
            (tokens,) = assert_scores(model, padded, expected, FLOAT64, padded, by_token=True).tokens
    assert body_path(model)
    assert [len(tokens[k]) for k in range(len(EXAMPLES))] == [len(ids) for ids, _ in EXAMPLES]
    u = random_direction(model)
    assert_rows([float(tokens[k].sum()) for k in range(len(EXAMPLES))], u, expected, FLOAT64)
    assert_scores(model.float(), padded, expected, FLOAT32)


def test_what_comes_back_to_a_padding_row_is_no_matter() -> None:
    """A norm without an epsilon, as Gemma 3n takes of embeddings, brings NaN to rows of zeros, which padding has."""
    torch.manual_seed(0)
    model: Any = gemma3n().double().eval()
    assert not model.get_input_embeddings().weight[0].any()
    batch = collate(EXAMPLES)
    with float64_throughout():
        expected = gradient_loop(model, EXAMPLES)
        assert_scores(model, batch, expected, FLOAT64)
        (tokens,) = assert_scores(model, batch, expected, FLOAT64, by_token=True).tokens
    assert all(of_example.isfinite().all() for of_example in tokens.values())


@pytest.mark.parametrize("architecture", sorted(FORGETFUL))
def test_packing_that_is_not_kept_apart_is_refused(architecture: str) -> None:
    """A model in which packed examples see one another is named, with what to do."""
    model = make(architecture)
    with pytest.raises(UserError, match=r"cannot be scored in batches.*do not pack examples"):
        gradient_pass(model, given([pack([[0, 3, 1], [2, 4]], EXAMPLES)]), directions=[random_direction(model)])


def test_packing_is_exact_or_refused() -> None:
    """Falcon keeps packed examples apart from one release of transformers on; in none is it silently wrong."""
    model, batch = make("falcon"), pack([[0, 3, 1], [2, 4]], EXAMPLES)
    u, refusal = random_direction(model), ""
    try:
        found = gradient_pass(model, given([batch]), directions=[u])
    except UserError as error:
        refusal = str(error)
    if refusal:
        assert "do not pack examples" in refusal
    else:
        assert_rows([found.rows[0][k] for k in range(len(EXAMPLES))], u, reference("falcon"), 1e-5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("architecture", ["llama with biases", "llama tied", "gpt2"])
@pytest.mark.parametrize("columns", [True, False])
def test_the_fast_taps_equal_the_general_one(architecture: str, columns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear, Conv1D and Embedding score as any other module does, by forward-mode differentiation."""
    model, batch = make(architecture), collate(EXAMPLES)
    u = random_direction(model)
    fast = gradient_pass(model, given([batch]), directions=[u], columns=columns)
    monkeypatch.setattr(interaction, "is_linear", lambda _: False)
    monkeypatch.setattr(
        tap,
        "_embedding_product",
        lambda module, u, args, kwargs, dtype: ModuleCall(module, args, kwargs, 0).derivative(u),
    )
    general = gradient_pass(model, given([batch]), directions=[u], columns=columns)
    assert fast.rows[0] == pytest.approx(general.rows[0], rel=FLOAT64)
    if columns:
        assert_same_gradients(fast.sums, general.sums, FLOAT64)


@pytest.mark.parametrize("architecture", ["llama tied", "gpt2"])
def test_weight_gradients_may_be_formed_in_blocks(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that no layer's weight is a multiple of change neither rows nor columns."""
    monkeypatch.setattr("dualsft.matrix.linear_tap._BREAK_EVEN", {"cpu": (0.0, 0.0), "cuda": (0.0, 0.0)})
    monkeypatch.setattr("dualsft.matrix.linear_tap._BLOCK", 100)
    with float64_throughout():
        assert_scores(make(architecture), collate(EXAMPLES), reference(architecture), FLOAT64)


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("architecture", ["llama tied", "gpt2", "mixtral"])
def test_rows_alone_form_no_weight_gradient(architecture: str, by_token: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without columns no parameter is given a gradient, and no linear layer makes one."""
    model, made, needed = make(architecture), [], []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: made.append(name))
    backward = LinearTap.backward

    def watched(hook: LinearTap, e: Tensor, a: Tensor, weight: Tensor, needs: tuple[bool, bool, bool], of: Any) -> Any:
        needed.append(needs[1])
        return backward(hook, e, a, weight, needs, of)

    monkeypatch.setattr(LinearTap, "backward", watched)
    monkeypatch.setattr(gradients, "spot_check", lambda *_: None)  # whose reference is autograd's gradient
    options: dict[str, Any] = {"directions": [random_direction(model)], "by_token": by_token}
    gradient_pass(model, given([collate(EXAMPLES)]), columns=False, **options)
    assert made == []
    assert needed
    assert not any(needed)
    gradient_pass(model, given([collate(EXAMPLES)]), **options)
    assert set(made) == {name for name, _ in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())


class PerToken(nn.Module):
    """A linear layer with a copy of its weight for each token."""

    def __init__(self, linear: nn.Linear, tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().expand(tokens, -1, -1).clone())

    def forward(self, x: Tensor) -> Tensor:
        """Token t of one example by the t-th copy."""
        return torch.einsum("bti,toi->bto", x, self.weight)


@pytest.mark.parametrize("name", ["self_attn.k_proj", "mlp.down_proj", "input_layernorm"])
def test_token_contributions_are_those_of_each_use_of_a_weight(name: str) -> None:
    """Token t contributes <u, ∂l/∂W_t>, where W_t is the weight as it is used at token t, one copy for each token."""
    model, batch = make("llama"), collate([EXAMPLES[0]])
    module, tokens = model.model.layers[0].get_submodule(name), len(EXAMPLES[0][0])
    weight = f"model.layers.0.{name}.weight"
    u = {weight: random_direction(model)[weight]}
    found = gradient_pass(model, given([batch]), directions=[u], columns=False, by_token=True).tokens[0][0]
    if isinstance(module, nn.Linear):
        model.set_submodule(weight.removesuffix(".weight"), copies := PerToken(module, tokens))
    else:
        module.weight = nn.Parameter(module.weight.detach().expand(tokens, -1).clone())
        copies = module
    (gradient,) = torch.autograd.grad(example_losses(model, batch).sum(), [copies.weight])
    expected = (gradient * u[weight]).flatten(1).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
