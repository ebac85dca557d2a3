import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualsft.errors import UserError
from dualsft.interaction import ColumnSums, RowSums, check_covered
from dualsft.layout import Layout
from dualsft.objective import example_losses
from dualsft.selection.scoring_mode import scoring_mode
from tests.selection.tiny import (
    ARCHITECTURES,
    Example,
    Gradients,
    assert_same_gradients,
    collate,
    gradient_loop,
    inner,
    inner_size,
    llama,
    make,
    make_examples,
    random_direction,
    total,
)


def both_sums(model: Any, examples: list[Example], u: Gradients) -> tuple[list[float], Gradients]:
    """Rows and columns of one padded batch, by one backward pass."""
    batch = collate(examples)
    with ColumnSums(model) as columns, RowSums(model, u) as rows:
        rows.begin(Layout.of(batch))
        example_losses(model, batch).sum().backward()
        assert rows.covered == set(columns.sums)
        return rows.read().tolist(), columns.sums


def assert_rows(found: list[float], u: Gradients, gradients: list[Gradients], relative: float) -> None:
    """Equal up to a fraction of the size of the numbers that were added."""
    assert len(found) == len(gradients)
    for value, g in zip(found, gradients, strict=True):
        assert value == pytest.approx(inner(u, g), rel=0.0, abs=relative * inner_size(u, g))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_sums_equal_a_loop_over_examples(architecture: str) -> None:
    """In a padded batch of mixed lengths, rows and columns are those of autograd over single unpadded examples.

    GPT-2 and OPT compute in float64 throughout; the others' norms and softmax are float32 whatever the weights are.
    """
    model, examples = make(architecture), make_examples()
    u = random_direction(model)
    gradients = gradient_loop(model, examples)
    rows, columns = both_sums(model, examples, u)
    exact = 1e-11 if architecture in ("gpt2", "opt") else 2e-6
    assert_rows(rows, u, gradients, exact)
    assert_same_gradients(columns, total(gradients), exact)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_sums_equal_the_float64_loop(architecture: str) -> None:
    """A float32 model's rows and columns differ from the same weights' float64 ones by rounding alone."""
    model, examples = make(architecture, torch.float32), make_examples()
    u = random_direction(model)
    rows, columns = both_sums(model, examples, u)
    gradients = gradient_loop(model.double(), examples)
    assert_rows(rows, u, gradients, 1e-5)
    assert_same_gradients(columns, total(gradients), 1e-5)


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


@pytest.mark.parametrize("architecture", ["llama tied", "gpt2", "qwen3"])
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
    with scoring_mode(model, checkpointing=True), RowSums(model, random_direction(model)) as rows:
        rows.begin(Layout.of(batch))
        losses = example_losses(model, batch)
        gc.collect()
        assert [reference() for reference in seen] == [None]
        losses.sum().backward()
        assert len(seen) == 2


class Toy(nn.Module):
    """Embedding, a middle, and a mean over tokens: one number per example."""

    def __init__(self, middle: nn.Module, use: Callable[[nn.Module, Tensor], Tensor] = lambda m, x: m(x)) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.middle, self._use = middle, use

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (example, token) to (example)."""
        return self._use(self.middle, self.embed(ids)).square().mean((1, 2))


def rectangle(rows: int, tokens: int) -> Layout:
    """Examples of equal length."""
    return Layout(rows, tokens, [(row, 0, tokens) for row in range(rows)])


def toy_sums(model: nn.Module, ids: Tensor) -> tuple[Tensor, Gradients]:
    """Rows and columns of a toy batch, with u = 1."""
    u = {name: torch.ones_like(p) for name, p in model.named_parameters() if p.requires_grad}
    with ColumnSums(model) as columns, RowSums(model, u) as rows:
        rows.begin(rectangle(*ids.shape))
        model(ids).sum().backward()
        check_covered(model, rows.covered, [name for name, total in columns.sums.items() if total.any()])
        return rows.read(), columns.sums


def test_a_weight_used_outside_its_module_is_refused_by_name() -> None:
    """A forward that takes a child's weight past the child's own forward is an error that names the weight."""
    torch.manual_seed(0)
    model = Toy(nn.Linear(4, 4), lambda linear, x: F.linear(x, linear.weight))
    with pytest.raises(UserError, match=r"\(Linear\).*middle\.weight"):
        toy_sums(model, torch.randint(11, (3, 5)))


def test_a_weight_used_past_its_module_once_breaks_the_sum_identity() -> None:
    """Where the same weight is also used properly, no name is missing, but Σ_i φ_i and Σ_j φ_j disagree."""
    torch.manual_seed(0)
    model = Toy(nn.Linear(4, 4), lambda linear, x: linear(x) + F.linear(x.square(), linear.weight))
    rows, columns = toy_sums(model, torch.randint(11, (3, 5)))
    assert float(rows.sum()) != pytest.approx(sum(float(g.sum()) for g in columns.values()), rel=1e-2)


class Shared(nn.Module):
    """Adds over examples: its output belongs to nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        """The batch's mean, (token, width)."""
        return (x * self.scale).mean(0)


def test_an_output_that_is_no_examples_is_refused_by_name() -> None:
    """A module whose output has no place for examples is named with its shape."""
    model = Toy(Shared(), lambda shared, x: x + shared(x))
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

    model, ids = Toy(Flat(), use).double(), torch.randint(11, (3, 5))
    rows, _ = toy_sums(model, ids)
    expected = [
        sum(float(g.sum()) for g in torch.autograd.grad(model(ids[k : k + 1]).sum(), list(model.parameters())))
        for k in range(3)
    ]
    assert rows.tolist() == pytest.approx(expected, rel=1e-12)


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


def test_read_before_backward_is_an_error() -> None:
    """Rows belong to a batch whose backward has run."""
    model = make("llama")
    with RowSums(model, random_direction(model)) as rows:
        rows.begin(rectangle(2, 3))
        with pytest.raises(RuntimeError, match="no backward pass"):
            rows.read()


def test_evaluation_is_not_tapped() -> None:
    """A forward pass without gradients leaves no trace in the rows' model."""
    model, batch = make("llama"), collate(make_examples())
    with RowSums(model, random_direction(model)) as rows, torch.no_grad():
        rows.begin(Layout.of(batch))
        assert example_losses(model, batch).grad_fn is None
