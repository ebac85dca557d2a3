from collections.abc import Collection, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dualsft.data.layout import Batch
from dualsft.errors import UserError
from dualsft.matrix.passes import compute_dtype, gradient_pass
from dualsft.objectives import example_losses
from dualsft.selection.remedies import remedies_by_key
from tests.cases import Example, Gradients, collate, given, make, make_examples, random_direction
from tests.references import assert_same_gradients, gradient_loop, inner, total

EXPLOSIVE = 60


def batches_of(examples: list[Example], size: int, leave_out: Collection[int] = ()) -> list[Batch]:
    """Batches in order; an example's id is 100 + its place."""
    kept = [(100 + k, example) for k, example in enumerate(examples) if 100 + k not in leave_out]
    parts = [kept[first : first + size] for first in range(0, len(kept), size)]
    return [collate([example for _, example in part], [i for i, _ in part]) for part in parts]


def free_of(token: int, lengths: tuple[int, ...]) -> list[Example]:
    """Examples in which this token does not occur."""
    return [
        ([1 if i == token else i for i in ids], [1 if i == token else i for i in labels])
        for ids, labels in make_examples(lengths)
    ]


def with_token(example: Example, token: int) -> Example:
    """The example with its first token replaced."""
    return [token, *example[0][1:]], example[1]


@pytest.mark.parametrize("architecture", ["llama tied", "gpt2"])
def test_pass_equals_the_loop_over_examples(architecture: str) -> None:
    """Over several batches, each example's row and the sum of all gradients are those of the loop."""
    model, examples = make(architecture), make_examples()
    u, gradients = random_direction(model), gradient_loop(model, examples)
    found = gradient_pass(model, given(batches_of(examples, 2)), directions=[u])
    assert found.rows[0] == pytest.approx({100 + k: inner(u, g) for k, g in enumerate(gradients)}, rel=1e-5)
    assert_same_gradients(found.sums, total(gradients), 2e-6)
    assert (found.counted, found.nonfinite, found.covered) == (5, set(), set(u))


def test_pass_without_a_direction_has_sums_alone() -> None:
    """Without u there are no rows, and the sums are the same."""
    model, examples = make("gpt2"), make_examples()
    found = gradient_pass(model, given(batches_of(examples, 3)))
    assert found.rows == []
    assert found.counted == 5
    assert_same_gradients(found.sums, total(gradient_loop(model, examples)), 1e-11)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_watch_sees_every_batch_once() -> None:
    """Progress is told of each batch of a pass in which nothing goes wrong."""
    seen: list[list[int]] = []

    def watch(batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            seen.append(batch["example_id"].tolist())
            yield batch

    gradient_pass(make("gpt2"), given(batches_of(make_examples(), 2)), watch)
    assert seen == [[100, 101], [102, 103], [104]]


def nan_model() -> Any:
    """A model whose loss is NaN on any text with the explosive token."""
    model = make("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[EXPLOSIVE] = torch.inf
    return model


class Explode(torch.autograd.Function):
    """The identity, with gradients multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.saved_tensors[0], None


def exploding_model(root: float = torch.inf, dtype: torch.dtype = torch.float64) -> Any:
    """A model whose loss is finite on the explosive token, but whose embedding's gradient is multiplied there twice."""

    def hook(_: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
        factors = torch.where(args[0] == EXPLOSIVE, root, 1.0).to(output.dtype).unsqueeze(-1)
        return Explode.apply(Explode.apply(output, factors), factors)

    model = make("llama", dtype)
    model.model.embed_tokens.register_forward_hook(hook)
    return model


def assert_pass_without(model: Any, examples: list[Example], bad: set[int], size: int) -> None:
    """The pass marks the bad ones and is, but for them, the pass over the others."""
    u = random_direction(model)
    found = gradient_pass(model, given(batches_of(examples, size)), directions=[u])
    clean = gradient_pass(model, given(batches_of(examples, size, leave_out=bad)), directions=[u])
    assert found.nonfinite == bad
    assert clean.nonfinite == set()
    assert found.counted == clean.counted == len(examples) - len(bad)
    assert found.rows[0] == pytest.approx(clean.rows[0], rel=1e-5, abs=1e-6)
    assert_same_gradients(found.sums, clean.sums, 2e-6)
    expected: Gradients = total(gradient_loop(model, [e for k, e in enumerate(examples) if 100 + k not in bad]))
    assert_same_gradients(found.sums, expected, 2e-6)


@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize("make_model", [nan_model, exploding_model])
def test_nonfinite_examples_are_left_out(make_model: Any, size: int) -> None:
    """A NaN loss, or an infinite gradient of a finite loss, marks its example, which leaves no trace in the rest."""
    examples = free_of(EXPLOSIVE, (9, 4, 13, 5, 7, 6))
    for k in (1, 4):
        examples[k] = with_token(examples[k], EXPLOSIVE)
    model = make_model()
    losses = example_losses(model, collate(examples))
    assert losses.isfinite().tolist() == [
        True,
        make_model is exploding_model,
        True,
        True,
        make_model is exploding_model,
        True,
    ]
    assert_pass_without(model, examples, {101, 104}, size)


def test_both_kinds_of_nonfinite_examples_at_once() -> None:
    """A batch may hold a NaN loss beside an infinite gradient; both are found."""
    examples = free_of(EXPLOSIVE, (9, 4, 13, 5))
    examples[2] = with_token(examples[2], EXPLOSIVE)
    examples = [([2 if i == 59 else i for i in ids], [2 if i == 59 else i for i in labels]) for ids, labels in examples]
    examples[0] = with_token(examples[0], 59)
    model = exploding_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[59] = torch.nan
    assert_pass_without(model, examples, {100, 102}, 4)


def test_nothing_finite_gives_empty_sums() -> None:
    """If no example is finite the pass counts none, and its sums are zero."""
    examples = [with_token(example, EXPLOSIVE) for example in make_examples((5, 6))]
    found = gradient_pass(nan_model(), given(batches_of(examples, 2)), directions=[random_direction(nan_model())])
    assert (found.counted, found.rows[0], found.nonfinite) == (0, {}, {100, 101})
    assert not any(value.count_nonzero() for value in found.sums.values())


def test_an_overflow_of_finite_gradients_is_an_error() -> None:
    """If a batch overflows although each of its examples is finite alone, the error says what to do, keys included."""
    example = with_token(free_of(EXPLOSIVE, (6,))[0], EXPLOSIVE)
    model = exploding_model(1.0, torch.float32)
    row = gradient_loop(model, [example])[0]["model.embed_tokens.weight"][EXPLOSIVE].abs().max()
    model = exploding_model(float(2e38 / row.double()) ** 0.5, torch.float32)
    assert gradient_pass(model, given(batches_of([example], 1))).nonfinite == set()
    with pytest.raises(
        UserError, match=r"\[100, 101\] overflow torch.float32.*; use smaller batches or float32 weights"
    ):
        gradient_pass(model, given(batches_of([example, example], 2)))
    with (
        pytest.raises(UserError, match=r"is finite; lower data\.batch_tokens or set model\.dtype to"),
        remedies_by_key(),
    ):
        gradient_pass(model, given(batches_of([example, example], 2)))


def test_compute_dtype_is_autocasts_where_it_is_on() -> None:
    """Activations have the weights' type, or the one that autocast brings them to."""
    model = make("gpt2", torch.float32)
    assert compute_dtype(model) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(model) == torch.bfloat16
    assert compute_dtype(model.bfloat16()) == torch.bfloat16
