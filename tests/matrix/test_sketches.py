import math

import pytest
import torch

from dualsft.matrix.pass_result import GradientPass
from dualsft.matrix.passes import gradient_pass
from dualsft.matrix.sketches import SKETCH_SIZE, Measurement, fold, random_signs
from tests.cases import given, make, make_examples, random_direction
from tests.matrix.test_passes import batches_of
from tests.references import assert_same_gradients, gradient_loop, inner, total

EVERYTHING = ("loss", "gradient_norm", "preconditioned_gradient_norm", "sketch")


def preconditioner(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A positive diagonal of wide range."""
    generator = torch.Generator().manual_seed(3)
    return {
        n: (3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)).exp() for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("architecture", ["llama tied", "gpt2", "mixtral"])
def test_norms_are_those_of_the_loop_over_examples(architecture: str, columns: bool) -> None:
    """‖g_i‖ and ‖P ⊙ g_i‖ of every example are those of autograd alone, tied weights and experts included."""
    model, examples = make(architecture), make_examples()
    p, u, gradients = preconditioner(model), random_direction(model), gradient_loop(model, examples)
    found = gradient_pass(
        model, given(batches_of(examples, 2)), directions=[u], columns=columns, measurement=Measurement(EVERYTHING, p)
    )
    for k, g in enumerate(gradients):
        scaled = {name: p[name] * of for name, of in g.items()}
        assert float(found.measured["gradient_norm"][100 + k]) == pytest.approx(math.sqrt(inner(g, g)), rel=1e-10)
        assert float(found.measured["preconditioned_gradient_norm"][100 + k]) == pytest.approx(
            math.sqrt(inner(scaled, scaled)), rel=1e-10
        )
        assert found.rows[0][100 + k] == pytest.approx(inner(u, g), rel=1e-6)  # a router is float32
    assert found.counted == 5
    if columns:
        assert_same_gradients(found.sums, total(gradients), 1e-11)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_sketch_is_a_signed_count_of_the_scaled_gradient() -> None:
    """Entry j of √P ⊙ g_i, with its sign, goes to component j mod K of its parameter's share, and nothing else does."""
    model, examples = make("llama tied"), make_examples()
    p = preconditioner(model)
    found = gradient_pass(model, given(batches_of(examples, 3)), measurement=Measurement(("sketch",), p))
    generator = torch.Generator().manual_seed(0)
    signs = {name: random_signs(w.numel(), generator) for name, w in model.named_parameters()}
    for k, g in enumerate(gradient_loop(model, examples)):
        slow = torch.zeros(SKETCH_SIZE, dtype=torch.float64)
        for name, of in g.items():
            entries = (p[name].sqrt() * of).flatten() * signs[name]
            slow.index_add_(0, torch.arange(len(entries)) % SKETCH_SIZE, entries)
        error = torch.as_tensor(found.measured["sketch"][100 + k], dtype=torch.float64) - slow
        assert float(error.abs().max()) < 1e-7 * float(slow.abs().max())


@pytest.mark.parametrize("shape", ["dense", "a few columns", "rank one"])
def test_products_of_sketches_estimate_products_of_vectors(shape: str) -> None:
    """Over many draws of S the mean error vanishes, and its spread is as promised, whatever the structure."""
    generator = torch.Generator().manual_seed(1)
    rows, width, draws = 1200, 512, 60
    x, y = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    if shape == "a few columns":
        x[:, 3:], y[:, 3:] = 0, 0
    if shape == "rank one":
        x, y = x[:, :1] @ x[:1], x[:, :1] @ y[:1]
    x, y = x.flatten(), 0.5 * x.flatten() + y.flatten()
    errors = []
    for _ in range(draws):
        signs = random_signs(len(x), generator)
        errors.append(float(fold(x * signs) @ fold(y * signs) - x @ y) / float(x.norm() * y.norm()))
    spread = torch.tensor(errors).std()
    assert abs(sum(errors) / draws) < 4 * float(spread) / math.sqrt(draws)
    assert float(spread) < 1.5 * math.sqrt(2 / SKETCH_SIZE)


def test_without_a_preconditioner_p_is_one() -> None:
    """Both norms agree then, and the sketch is of the gradient itself."""
    model, examples = make("gpt2"), make_examples()
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    plain, explicit = (
        gradient_pass(model, given(batches_of(examples, 3)), measurement=Measurement(EVERYTHING, p)).measured
        for p in (None, ones)
    )
    for i in plain["sketch"]:
        assert plain["gradient_norm"][i] == pytest.approx(float(plain["preconditioned_gradient_norm"][i]), rel=1e-12)
        assert torch.equal(*(torch.as_tensor(of["sketch"][i]) for of in (plain, explicit)))


def test_the_loss_alone_needs_no_pass_of_its_own() -> None:
    """Losses come from the batches as they are, and are those of each example alone."""
    model, examples = make("llama tied"), make_examples()
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    batched = gradient_pass(model, given(batches_of(examples, 5)), measurement=Measurement(("loss",))).measured["loss"]
    assert len(seen) == 1
    alone = gradient_pass(model, given(batches_of(examples, 1)), measurement=Measurement(("loss",))).measured["loss"]
    assert batched == pytest.approx(alone, rel=1e-12)


def test_what_was_measured_survives_being_kept() -> None:
    """State and back: the same ids, numbers and vectors; also of a pass that counted nothing."""
    model, examples = make("gpt2"), make_examples()
    found = gradient_pass(model, given(batches_of(examples, 2)), measurement=Measurement(EVERYTHING))
    again = GradientPass.from_state(*found.state())
    assert again.measured.keys() == found.measured.keys() == set(EVERYTHING)
    for name, values in found.measured.items():
        kept = again.measured[name]
        assert list(kept) == list(values)
        assert all(torch.equal(torch.as_tensor(kept[i]), torch.as_tensor(value)) for i, value in values.items())
