import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from transformers.pytorch_utils import Conv1D

from dualsft.data.layout import AmbiguousShapeError, Layout
from dualsft.errors import UserError
from dualsft.matrix import linear_tap
from dualsft.matrix.interaction import ColumnSums, RowSums
from dualsft.matrix.passes import gradient_pass
from dualsft.matrix.spot_check import check_covered
from dualsft.objectives import example_losses
from dualsft.selection.passes import scoring_mode
from tests.cases import (
    ARCHITECTURES,
    Example,
    Gradients,
    collate,
    given,
    llama,
    make,
    make_examples,
    pack,
    random_direction,
)
from tests.references import assert_rows, assert_same_gradients, gradient_loop, total


def both_sums(model: Any, examples: list[Example], u: Gradients) -> tuple[list[float], Gradients]:
    """Rows and columns of one padded batch, by one backward pass."""
    batch = collate(examples)
    with ColumnSums(model) as columns, RowSums(model, [u]) as rows:
        rows.begin(Layout.of(batch))
        example_losses(model, batch).sum().backward()
        assert rows.covered == set(columns.sums)
        return rows.read()[0].tolist(), columns.sums


@pytest.mark.parametrize("architecture", ["llama tied", "gpt2", "mixtral"])
def test_rows_do_not_depend_on_the_company(architecture: str) -> None:
    """An example's row is the same alone, in a batch, and in a batch in another order with more padding."""
    model, examples = make(architecture), make_examples()
    u = random_direction(model)
    together, _ = both_sums(model, examples, u)
    alone = [both_sums(model, [example], u)[0][0] for example in examples]
    wider, _ = both_sums(model, [*make_examples([20], seed=9), *reversed(examples)], u)
    assert together == pytest.approx(alone, rel=1e-5, abs=1e-6)
    assert list(reversed(wider[1:])) == pytest.approx(alone, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_padding_row_has_no_gradient(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd gives an embedding's padding row no gradient where its token occurs in the text, and nor do the rows."""
    monkeypatch.setitem(ARCHITECTURES, "llama", lambda: llama(pad_token_id=0))
    model, examples = make(architecture), make_examples()
    embedding = model.get_input_embeddings()
    assert embedding.padding_idx == 0
    assert all(0 in ids for ids, _ in examples)
    u = random_direction(model)
    u["model.embed_tokens.weight"][0] = 1e3
    rows, _ = both_sums(model, examples, u)
    assert_rows(rows, u, gradient_loop(model, examples), 2e-6)


@pytest.mark.parametrize("architecture", ["llama tied", "gpt2", "qwen3", "gemma3"])
def test_checkpointing_changes_nothing(architecture: str) -> None:
    """Rows and columns are the same when activations are recomputed in the backward pass."""
    model, examples = make(architecture), make_examples()
    u = random_direction(model)
    rows, columns = both_sums(model, examples, u)
    with scoring_mode(model, checkpointing=True):
        recomputed, recomputed_columns = both_sums(model, examples, u)
    assert recomputed == pytest.approx(rows, rel=1e-12)
    assert_same_gradients(recomputed_columns, columns, 1e-12)


def test_taps_do_not_keep_checkpointed_activations() -> None:
    """Inputs inside a checkpointed block are gone after the forward pass: a tap leaves keeping them to autograd."""
    model, batch = make("llama"), collate(make_examples())
    seen: list[weakref.ref[Tensor]] = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    with scoring_mode(model, checkpointing=True), RowSums(model, [random_direction(model)]) as rows:
        rows.begin(Layout.of(batch))
        losses = example_losses(model, batch)
        gc.collect()
        before = len(seen)
        assert all(reference() is None for reference in seen)
        losses.sum().backward()
        assert len(seen) == before + 1


class Toy(nn.Module):
    """Embedding, a middle, and a mean over tokens: one number per example."""

    def __init__(self, middle: nn.Module, use: Callable[[Any, Tensor], Tensor] = lambda m, x: m(x)) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.middle, self._use = middle, use

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (example, token) to (example)."""
        return self._use(self.middle, self.embed(ids)).square().mean((1, 2))


def rectangle(rows: int, tokens: int) -> Layout:
    """Examples of equal length."""
    return Layout(rows, tokens, [(row, 0, tokens) for row in range(rows)])


def assert_exact(model: nn.Module, ids: Tensor) -> None:
    """Rows and columns of a toy batch are those of autograd over each example alone."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows, columns = toy_sums(model, ids)
    alone = [torch.autograd.grad(model(ids[k : k + 1]).sum(), list(trained.values())) for k in range(len(ids))]
    gradients = [dict(zip(trained, found, strict=True)) for found in alone]
    assert_rows(rows.tolist(), {name: torch.ones_like(p) for name, p in trained.items()}, gradients, 1e-12)
    assert_same_gradients(columns, total(gradients), 1e-12)


def toy_sums(model: nn.Module, ids: Tensor) -> tuple[Tensor, Gradients]:
    """Rows and columns of a toy batch, with u = 1."""
    u = {name: torch.ones_like(p) for name, p in model.named_parameters() if p.requires_grad}
    with ColumnSums(model) as columns, RowSums(model, [u]) as rows:
        rows.begin(rectangle(*ids.shape))
        model(ids).sum().backward()
        check_covered(model, rows.covered, [name for name, total in columns.sums.items() if total.any()])
        return rows.read()[0], columns.sums


def test_a_weight_used_outside_its_module_is_scored_where_it_is_used() -> None:
    """A forward that takes a child's weight past the child's own forward is differentiated by it."""
    torch.manual_seed(0)
    model = Toy(nn.Linear(4, 4), lambda linear, x: F.linear(x, linear.weight) + linear.bias)
    assert_exact(model.double(), torch.randint(11, (3, 5)))


def test_a_weight_used_both_ways_is_scored_once_for_each_use() -> None:
    """Where the same weight is also used properly, both uses count, and neither twice."""
    torch.manual_seed(0)
    model = Toy(nn.Linear(4, 4), lambda linear, x: linear(x) + F.linear(x.square(), linear.weight))
    assert_exact(model.double(), torch.randint(11, (3, 5)))


class Shared(nn.Module):
    """Adds over examples: its output belongs to nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        """The batch's mean, (token, width)."""
        return (x * self.scale).mean(0)


class Mean(Toy):
    """Gives out the batch's mean."""

    def forward(self, ids: Tensor) -> Tensor:
        """A number."""
        return super().forward(ids).mean()


def test_an_output_that_is_no_examples_is_refused_by_name() -> None:
    """A module whose output has no place for examples, as little as those around it, is named with its shape."""
    model = Mean(Shared(), lambda shared, x: x + shared(x))
    with pytest.raises(UserError, match=r"middle \(Shared\) has shape \(5, 4\).*3 examples of 5 tokens"):
        toy_sums(model, torch.randint(11, (3, 5)))


class Flat(nn.Module):
    """Works on flattened tokens and returns several things, as routers do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, *, power: int) -> tuple[dict[str, Tensor], int]:
        """Two floating outputs of flattened tokens in a dictionary, and a number."""
        flat = x.flatten(0, 1)
        return {"a": flat * self.scale, "b": (flat * self.scale) ** power}, power


def test_every_output_of_a_module_is_tapped() -> None:
    """Outputs in tuples and dictionaries, over flattened tokens, given keywords: all contribute."""
    torch.manual_seed(0)

    def use(flat: nn.Module, x: Tensor) -> Tensor:
        found, _ = flat(x, power=3)
        return (found["a"] + found["b"].sin()).view_as(x)

    assert_exact(Toy(Flat(), use).double(), torch.randint(11, (3, 5)))


class OneWay(torch.autograd.Function):
    """Differentiable backwards alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return grads[0] * w, (grads[0] * x).sum((0, 1))


class Kernel(nn.Module):
    """A module around a kernel of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        """Scale."""
        return OneWay.apply(x, self.weight)


def test_a_module_without_forward_derivative_is_refused_by_name() -> None:
    """A custom kernel that forward-mode differentiation cannot enter is named."""
    with pytest.raises(UserError, match=r"middle \(Kernel\) has no forward-mode derivative"):
        toy_sums(Toy(Kernel()), torch.randint(11, (3, 5)))


class Fickle(nn.Module):
    """Cannot be called a third time, as it would be to be differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.calls = nn.Parameter(torch.ones(4)), 0

    def forward(self, x: Tensor) -> Tensor:
        """Scale, twice."""
        self.calls += 1
        if self.calls > 2:  # once to see what it uses, once to score it
            raise KeyError("gone")
        return x * self.scale


def test_whatever_a_module_answers_with_is_told_as_its_own() -> None:
    """An error in a module's own code, met as it is differentiated, names the module."""
    with pytest.raises(UserError, match=r"middle \(Fickle\) has no forward-mode derivative.*gone"):
        toy_sums(Toy(Fickle()), torch.randint(11, (3, 5)))


class Bias(nn.Module):
    """Needs its input for nothing but the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        """Add."""
        return x + self.bias


def test_an_input_that_is_modified_in_place_is_refused_by_name() -> None:
    """A tap needs the module's input in the backward pass; if it is gone, the module is named."""

    def use(bias: nn.Module, x: Tensor) -> Tensor:
        x = x * 1
        y = bias(x)
        x.mul_(2)
        return x + y

    with pytest.raises(UserError, match=r"The input of middle \(Bias\) is modified in place"):
        toy_sums(Toy(Bias(), use), torch.randint(11, (3, 5)))


@pytest.mark.parametrize("middle", [nn.Linear(4, 4), nn.LayerNorm(4), Bias()], ids=lambda m: type(m).__name__)
def test_outputs_may_be_modified_in_place(middle: nn.Module) -> None:
    """As residuals are, whichever tap they come from: an embedding's, a linear layer's, any other's."""

    def use(module: nn.Module, x: Tensor) -> Tensor:
        x *= 2
        y = module(x.sin())
        y += x
        y[:, 0] = x[:, 1]
        return y

    assert_exact(Toy(middle, use).double(), torch.randint(11, (3, 5)))


class Twice(nn.Module):
    """One parameter by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift."""
        return x * self.scale + self.shift


class Head(nn.Module):
    """Uses its parameter, which is also its child's."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Bias()
        self.bias = self.child.bias

    def forward(self, x: Tensor) -> Tensor:
        """The child's forward and more."""
        return self.child(x).sin() * self.bias


@pytest.mark.parametrize("middle", [Twice, Head])
def test_each_use_of_a_shared_parameter_counts_once(middle: type[nn.Module]) -> None:
    """Under a second name in the same module, or as a child's too."""
    assert_exact(Toy(middle()).double(), torch.randint(11, (3, 5)))


class Scaled(nn.Linear):
    """Not only a Wᵀ + b."""

    def forward(self, x: Tensor) -> Tensor:
        """A linear layer's output, bent by its own weight."""
        return super().forward(x) * self.weight.sum()


class Pair(nn.Module):
    """Two linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """One behind the other."""
        return self.second(self.first(x).sin())


def frozen(layer: nn.Module, name: str) -> nn.Module:
    """The layer with one of its parameters frozen."""
    layer.get_parameter(name).requires_grad_(False)
    return layer


LINEAR: dict[str, Callable[[], nn.Module]] = {
    "frozen weight": lambda: frozen(nn.Linear(4, 4), "weight"),
    "frozen bias": lambda: frozen(nn.Linear(4, 4), "bias"),
    "Conv1D with a frozen weight": lambda: frozen(Conv1D(4, 4), "weight"),
    "Conv1D with a frozen bias": lambda: frozen(Conv1D(4, 4), "bias"),
    "narrow": lambda: nn.Linear(4, 2),
    "wide": lambda: nn.Linear(4, 7, bias=False),
    "subclass": lambda: Scaled(4, 4),
    "shared weight": Pair,
}


@pytest.mark.parametrize("breaks_even", [(0.0, 0.0), (1e9, 0.0)], ids=["by gradient", "by product"])
@pytest.mark.parametrize("middle", LINEAR)
def test_linear_layers_of_all_kinds_are_exact(
    middle: str, breaks_even: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a part frozen, of any shape, sharing a weight, or with a forward of their own, by both ways."""
    torch.manual_seed(0)
    monkeypatch.setattr("dualsft.matrix.linear_tap._BREAK_EVEN", {"cpu": breaks_even, "cuda": breaks_even})
    assert_exact(Toy(LINEAR[middle]()).double(), torch.randint(11, (3, 5)))


class Symmetric(nn.Module):
    """Makes a weight symmetric."""

    def forward(self, weight: Tensor) -> Tensor:
        """Add the transpose."""
        return weight + weight.mT


def test_a_parametrized_linear_layer_is_scored_as_a_whole() -> None:
    """What makes a weight of another parameter has no examples in its output; the layer that uses it has."""
    torch.manual_seed(0)
    linear = nn.Linear(4, 4)
    parametrize.register_parametrization(linear, "weight", Symmetric())
    assert_exact(Toy(linear).double(), torch.randint(11, (3, 5)))


def test_a_parametrization_without_forward_derivative_is_refused_by_name() -> None:
    """The layer is named, and why."""
    linear = parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"middle \(ParametrizedLinear\) has no forward-mode derivative"):
        toy_sums(Toy(linear), torch.randint(11, (3, 5)))


def test_a_bias_without_a_direction_keeps_its_column() -> None:
    """A parameter that is summed but not scored loses nothing by the tap on its layer."""
    torch.manual_seed(0)
    model, ids = Toy(nn.Linear(4, 4)).double(), torch.randint(11, (3, 5))
    with ColumnSums(model) as columns, RowSums(model, [{"middle.weight": torch.ones(4, 4)}]) as rows:
        rows.begin(rectangle(3, 5))
        model(ids).sum().backward()
    expected = torch.autograd.grad(model(ids).sum(), [model.get_parameter("middle.bias")])[0]
    torch.testing.assert_close(columns.sums["middle.bias"], expected)


def test_an_output_per_example_needs_no_token_axis() -> None:
    """A pooled output is its example's as a whole; of tokens it has none, and whoever wants them is told so."""
    torch.manual_seed(0)
    model = Toy(nn.Linear(4, 6), lambda pool, x: x * pool(x.mean(1)).sum(-1)[:, None, None]).double()
    assert_exact(model, ids := torch.randint(11, (3, 5)))
    with RowSums(model, [{"middle.weight": torch.ones(6, 4)}], by_token=True) as rows:
        rows.begin(rectangle(3, 5))
        with pytest.raises(UserError, match=r"middle \(Linear\) has shape \(3, 6\)"):
            model(ids)


class Hidden(nn.Module):
    """Hides its output in an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> SimpleNamespace:
        """Scale."""
        return SimpleNamespace(value=x * self.scale)


def test_an_output_that_is_hidden_is_left_to_the_module_around_it() -> None:
    """A module that gives out no tensor where taps look for one is scored further out."""
    torch.manual_seed(0)
    model = Toy(Hidden(), lambda hidden, x: hidden(x).value)
    assert_exact(model.double(), torch.randint(11, (3, 5)))


class Sometimes(nn.Module):
    """Uses its weight on long rows alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        """Scale, if it is worth it."""
        return x * self.scale if x.shape[1] > 4 else x.sin()


def test_a_weight_that_is_not_used_at_first_is_scored_when_it_is() -> None:
    """What the first batch does not tell of a weight is taken to be as usual: its own module uses it."""
    torch.manual_seed(0)
    model = Toy(Sometimes()).double()
    with RowSums(model, [{"middle.scale": torch.ones(4)}]) as rows:
        for tokens in (4, 5):
            rows.begin(rectangle(3, tokens))
            model(ids := torch.randint(11, (3, tokens))).sum().backward()
    alone = [torch.autograd.grad(model(row[None]).sum(), [model.get_parameter("middle.scale")])[0].sum() for row in ids]
    torch.testing.assert_close(rows.read()[0], torch.stack(alone))


class Scores(nn.Module):
    """Gives out a square over tokens for each head, as attention gives out its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (example, head, token, token)."""
        return (x @ x.mT)[:, None].sin() * self.scale


@pytest.mark.parametrize("tokens", [(5, 6), (4, 5), (5, 4)])
def test_squares_over_tokens_are_told_at_the_second_width(tokens: tuple[int, int]) -> None:
    """Two axes that follow the row's length are both tokens, though there be four heads and four tokens."""
    torch.manual_seed(0)
    model = Toy(Scores(), lambda scores, x: (scores(x) @ x[:, None]).sum(1)).double()
    u = torch.randn(4, 1, 1, dtype=torch.float64)
    with RowSums(model, [{"middle.scale": u}], by_token=True) as rows:
        rows.begin(rectangle(3, tokens[0]))
        model(torch.randint(11, (3, tokens[0])))
        with pytest.raises(AmbiguousShapeError):
            rows.check()
        for width in reversed(tokens):
            rows.begin(rectangle(3, width))
            model(ids := torch.randint(11, (3, width))).sum().backward()
            torch.testing.assert_close(rows.read_tokens(), contributions_of_scores(model, ids, u))


def contributions_of_scores(model: Toy, ids: Tensor, u: Tensor) -> Tensor:
    """By hand: Σ over heads and keys of u · ∂y/∂scale · ∂l/∂y at each query."""
    x = model.embed(ids).detach()
    squares = (x @ x.mT)[:, None].sin()
    y = (squares * model.middle.scale).detach().requires_grad_()
    (e,) = torch.autograd.grad((y @ x[:, None]).sum(1).square().mean((1, 2)).sum(), [y])
    return (squares * u * e).sum((1, 3))


def test_token_contributions_by_hand() -> None:
    """Without attention, token t contributes what its own l_t gives: e_t · (U x_t + u_b), and (Wᵀ e_t) · U[id_t]."""
    torch.manual_seed(0)
    model, ids = Toy(nn.Linear(4, 3)).double(), torch.randint(11, (3, 5))
    u = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    with RowSums(model, [u], by_token=True) as rows:
        rows.begin(rectangle(3, 5))
        model(ids).sum().backward()
    x = model.embed(ids)
    e = 2 * model.middle(x) / (5 * 3)
    linear = (e * (x @ u["middle.weight"].T + u["middle.bias"])).sum(2)
    embedding = (e @ model.middle.weight * u["embed.weight"][ids]).sum(2)
    torch.testing.assert_close(rows.read_tokens(), (linear + embedding).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_rescaling_embeddings_are_refused(options: dict[str, Any]) -> None:
    """An embedding whose gradient depends on the whole batch has no per-example gradient."""
    model = Toy(nn.Identity())
    model.embed = nn.Embedding(11, 4, **options)
    with pytest.raises(UserError, match=r"embed \(Embedding\)"):
        toy_sums(model, torch.randint(11, (3, 5)))


def test_frozen_weights_are_left_out() -> None:
    """Frozen weights have no sums, and the rows are those of the others."""
    torch.manual_seed(0)
    model, ids = Toy(nn.Linear(4, 4)), torch.randint(11, (3, 5))
    model.embed.requires_grad_(False)
    rows, columns = toy_sums(model, ids)
    assert set(columns) == {"middle.weight", "middle.bias"}
    assert float(rows.sum()) == pytest.approx(sum(float(g.sum()) for g in columns.values()), rel=1e-5)


def test_nothing_is_left_behind() -> None:
    """After a pass the model has no gradients and no hooks."""
    model = make("llama tied")
    both_sums(model, make_examples(), random_direction(model))
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def test_sums_of_bfloat16_gradients_are_float32() -> None:
    """A thousand gradients of 1 add up to 1000; in bfloat16 they would stop at 256."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    with ColumnSums(model) as columns:
        for _ in range(1000):
            model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    assert columns.sums["weight"].dtype == torch.float32
    assert columns.sums["weight"].item() == 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_directions_do_not_underflow(dtype: torch.dtype) -> None:
    """Rows scale with u down to 2^-90, far below what float16 can hold."""
    model, examples = make("gpt2", dtype), make_examples()
    u = random_direction(model)
    rows, _ = both_sums(model, examples, u)
    tiny, _ = both_sums(model, examples, {name: value * 2.0**-90 for name, value in u.items()})
    assert all(tiny)
    assert [value * 2.0**90 for value in tiny] == pytest.approx(rows, rel=1e-6)


def test_bfloat16_rows_are_close_to_float64() -> None:
    """A bfloat16 model's rows agree with the float64 loop over the same weights to bfloat16's three digits."""
    model, examples = make("llama", torch.bfloat16), make_examples()
    u = random_direction(model)
    rows, _ = both_sums(model, examples, u)
    assert_rows(rows, u, gradient_loop(model.double(), examples), 1e-2)


@pytest.mark.parametrize("way", ["rows and columns", "rows alone", "by token", "packed", "by gradient"])
@pytest.mark.parametrize("architecture", ["llama with biases", "gpt2", "mixtral"])
def test_a_bfloat16_direction_gives_the_same_bits(architecture: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 model's rows are those of a float32 direction, as taps round it themselves.

    All but the products with dW_i, which are in float32: there they are those of the rounded direction.
    """
    if way == "by gradient":
        monkeypatch.setattr(linear_tap, "by_gradient_pays", lambda *_: True)
    model, examples = make(architecture, torch.bfloat16), make_examples()
    u = random_direction(model)
    held = {name: value.bfloat16() for name, value in u.items()}
    us = [held, {n: value.float() for n, value in held.items()} if way == "by gradient" else u]
    batch = pack([[0, 1], [2, 3, 4]], examples) if way == "packed" else collate(examples)
    found = gradient_pass(model, given([batch]), directions=us, columns=way != "rows alone", by_token=way == "by token")
    assert found.rows[0] == found.rows[1]
    assert len(set(found.rows[0].values())) == len(examples)


def test_read_before_backward_is_an_error() -> None:
    """Rows belong to a batch whose backward has run."""
    model = make("llama")
    with RowSums(model, [random_direction(model)]) as rows:
        rows.begin(rectangle(2, 3))
        with pytest.raises(RuntimeError, match="no backward pass"):
            rows.read()


def test_evaluation_is_not_tapped() -> None:
    """A forward pass without gradients leaves no trace in the rows' model."""
    model, batch = make("llama"), collate(make_examples())
    with RowSums(model, [random_direction(model)]) as rows, torch.no_grad():
        rows.begin(Layout.of(batch))
        assert example_losses(model, batch).grad_fn is None
