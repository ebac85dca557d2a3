from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualsft.errors import UserError
from dualsft.matrix.curvature import (
    HessianVectorProduct,
    check_differences,
    check_smooth,
    difference_step,
    displaced,
    twice_differentiable,
)
from dualsft.matrix.passes import gradient_pass
from dualsft.objectives import example_losses
from dualsft.selection.passes import scoring_mode
from tests.cases import ARCHITECTURES, Gradients, collate, given, llama, make, make_examples, pack, random_direction
from tests.references import assert_same_gradients, float64_throughout, total

EXAMPLES = make_examples()
SMOOTH = sorted(set(ARCHITECTURES) - {"opt"})
"""OPT's ReLU has kinks, between which a difference sees what no derivative at a point does."""


def direction(model: Any, seed: int = 2) -> Gradients:
    """A random one, zero where autograd gives an embedding's padding row no gradient, as ḡ is."""
    d = random_direction(model, seed)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            for name, parameter in model.named_parameters():
                if parameter is module.weight:
                    d[name][module.padding_idx] = 0
    return d


def product_loop(model: Any, d: Gradients) -> Gradients:
    """Σ_i (∇² l_i) d: the gradient of <∇ l_i, d>, one unpadded example at a time."""
    parameters = dict(model.named_parameters())
    found = []
    with twice_differentiable(model):
        for example in EXAMPLES:
            loss = example_losses(model, collate([example])).sum()
            first = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
            inner: Any = sum((g * d[n]).sum() for n, g in zip(parameters, first, strict=True) if g is not None)
            second = torch.autograd.grad(inner, list(parameters.values()), allow_unused=True)
            pairs = zip(parameters.items(), second, strict=True)
            found.append({n: torch.zeros_like(p) if h is None else h for (n, p), h in pairs})
    return total(found)


def product(model: Any, d: Gradients, batches: list[Any]) -> Gradients:
    """The same by one pass."""
    with twice_differentiable(model):
        return dict(gradient_pass(model, given(batches), derivative=HessianVectorProduct(model, d)).sums)


def difference(model: Any, d: Gradients, batches: list[Any]) -> Gradients:
    """The same by a central difference."""
    step, sums = difference_step(model, d), []
    for sign in (1, -1):
        with displaced(model, d, sign * step):
            sums.append(gradient_pass(model, given(batches)).sums)
    return {name: (sums[0][name] - sums[1][name]) / (2 * step) for name in d}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_equal_the_loop(architecture: str) -> None:
    """One pass over a padded batch gives Σ_i H_i d of every architecture, all weights included."""
    with float64_throughout():
        model = make(architecture)
        d = direction(model)
        assert_same_gradients(product(model, d, [collate(EXAMPLES)]), product_loop(model, d), 1e-9)


@pytest.mark.parametrize("architecture", SMOOTH)
def test_differences_approach_the_product(architecture: str) -> None:
    """The central difference of two passes agrees with double differentiation, in float64 to 1e-6."""
    with float64_throughout():
        model = make(architecture)
        d = direction(model)
        batches = [collate(EXAMPLES)]
        assert_same_gradients(difference(model, d, batches), product(model, d, batches), 1e-6)


@pytest.mark.parametrize("architecture", ["llama tied", "gpt2"])
def test_differences_in_float32(architecture: str) -> None:
    """In float32 they agree to 5e-3."""
    model = make(architecture, torch.float32)
    d = {name: part.float() for name, part in direction(model).items()}
    batches = [collate(EXAMPLES)]
    assert_same_gradients(difference(model, d, batches), product(model, d, batches), 5e-3)


@pytest.mark.parametrize("way", ["several batches", "packed", "recomputed"])
@pytest.mark.parametrize("architecture", ["llama tied", "gpt2"])
def test_products_do_not_depend_on_the_way(architecture: str, way: str) -> None:
    """Several batches, packed rows and recomputed activations give what one padded batch does."""
    with float64_throughout():
        model = make(architecture)
        d = direction(model)
        expected = product(model, d, [collate(EXAMPLES)])
        batches = [collate(EXAMPLES)]
        if way == "several batches":
            batches = [collate(EXAMPLES[:2]), collate(EXAMPLES[2:])]
        elif way == "packed":
            batches = [pack([[0, 3, 1], [2, 4]], EXAMPLES)]
        with scoring_mode(model, checkpointing=way == "recomputed"):
            assert_same_gradients(product(model, d, batches), expected, 1e-10)


def test_a_weight_without_curvature_has_none() -> None:
    """Where the gradient depends on no weight, or a weight takes no part, the product is zero."""
    torch.manual_seed(0)
    model: Any = nn.Module()
    model.curved, model.straight, model.idle = (nn.Parameter(torch.randn(3).double()) for _ in range(3))
    d = {name: torch.ones(3).double() for name, _ in model.named_parameters()}
    HessianVectorProduct(model, d)((model.curved**3).sum() + model.straight.sum())
    torch.testing.assert_close(model.curved.grad, 6 * model.curved.detach())
    assert model.straight.grad is None
    assert model.idle.grad is None


def test_frozen_weights_are_left_out() -> None:
    """A frozen weight has no part in d, and gets no product."""
    with float64_throughout():
        model = make("llama")
        for parameter in model.model.embed_tokens.parameters():
            parameter.requires_grad_(False)
        d = {n: part for n, part in direction(model).items() if n != "model.embed_tokens.weight"}
        found = product(model, d, [collate(EXAMPLES)])
    assert set(found) == set(d)


class Once(torch.autograd.Function):
    """Differentiable once alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * 1


def test_what_has_no_second_derivative_is_refused() -> None:
    """A kernel that can be differentiated only once ends in one sentence that names the way out."""
    model = make("llama")
    model.model.layers[0].register_forward_hook(lambda _, args, output: Once.apply(output))
    with pytest.raises(UserError, match=r"cannot be differentiated twice \(.*once_differentiable.*finite_difference"):
        product(model, direction(model), [collate(EXAMPLES)])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fused_attention_is_left_out() -> None:
    """Inside, attention goes in plain steps; outside, it may not be differentiable twice."""
    with twice_differentiable(nn.Linear(1, 1)):
        assert torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_displaced_model_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    """Inside, θ + step d; afterwards θ, also after an error, and frozen weights never move."""
    model = make("gpt2", dtype)
    model.get_parameter("transformer.wpe.weight").requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    d = {name: part.to(dtype) for name, part in random_direction(model).items()}

    def inside() -> None:
        with displaced(model, d, 0.25):
            for name, parameter in model.named_parameters():
                moved = before[name] + 0.25 * d[name] if name in d else before[name]
                assert torch.equal(parameter.detach(), moved)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        inside()
    assert all(torch.equal(p.detach(), before[name]) for name, p in model.named_parameters())


@pytest.fixture
def autocast() -> Iterator[None]:
    """Computation in bfloat16 with weights stored in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        yield


def test_half_precision_is_refused() -> None:
    """A difference of gradients of bfloat16 weights is refused, naming the type and the way out."""
    with pytest.raises(UserError, match=r"drowns in the rounding of bfloat16; compute in float32, or"):
        check_differences(make("llama", torch.bfloat16))
    check_differences(make("llama", torch.float32))


@pytest.mark.usefixtures("autocast")
def test_half_precision_computation_is_refused() -> None:
    """So is one of float32 weights that are cast to bfloat16 where they are used."""
    with pytest.raises(UserError, match=r"rounding of bfloat16; compute in float32"):
        check_differences(make("llama", torch.float32))


def test_jumps_are_told_from_slopes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a longer step sends tokens to other experts the difference is refused; a smooth model's is taken."""
    batches, points = [collate(EXAMPLES)], {}
    with float64_throughout():
        for architecture, size in (("llama", 1e-3), ("mixtral", 1e-5), ("gpt-oss", 1e-2)):
            monkeypatch.setattr("dualsft.matrix.curvature._RELATIVE_STEP", {torch.float64: size})
            model = make(architecture)
            d = direction(model)
            step = difference_step(model, d)
            for sign in (1, 0, -1):
                with displaced(model, d, sign * step):
                    points[sign] = gradient_pass(model, given(batches)).sums
            if architecture == "gpt-oss":
                with pytest.raises(UserError, match=r"The prior gradient jumps between.*method to exact"):
                    check_smooth(points[1], points[-1], points[0], "prior")
            else:
                check_smooth(points[1], points[-1], points[0], "validation")


def test_the_step_is_a_share_of_the_weights() -> None:
    """‖εd‖ / ‖θ‖ is the same whatever the length of d; a zero d is refused."""
    model = llama().double()
    d = random_direction(model)
    assert difference_step(model, {n: 7 * x for n, x in d.items()}) == pytest.approx(difference_step(model, d) / 7)
    with pytest.raises(UserError, match="mean gradient is zero"):
        difference_step(model, {n: torch.zeros_like(x) for n, x in d.items()})
