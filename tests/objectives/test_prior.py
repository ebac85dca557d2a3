"""The prior's own arithmetic, against loops over examples and tokens."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from dualsft.data.layout import Batch, Layout
from dualsft.errors import UserError
from dualsft.selection import Warmup
from dualsft.selection.prior import Confidence, Prior
from tests.cases import Example, Gradients, collate, make, make_examples, pack, random_direction
from tests.references import assert_same_gradients, float64_throughout, inner, slow_prior

CONFIDENCES: tuple[Confidence, ...] = ("uniform", "max_prob", "entropy_inv")


def examples_with_a_bare_one() -> list[Example]:
    """Five examples and one, in the middle, without supervised tokens."""
    examples = make_examples()
    bare = examples[1][0]
    return [*examples[:2], (bare, [-100] * len(bare)), *examples[2:]]


def packed(examples: list[Example]) -> Batch:
    """All six in three rows, so that examples begin in the middle of rows."""
    return pack([[3, 1], [0, 2, 5], [4]], examples)


def sharp(dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A tiny Llama that is sure of some tokens and not of others, so that confidences and temperatures matter."""
    model = make("llama", dtype, seed)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    return model


SHAPES: dict[str, Callable[[list[Example]], Batch]] = {"padded": collate, "packed": packed}


@pytest.fixture
def pair() -> Iterator[tuple[PreTrainedModel, PreTrainedModel]]:
    """A model and a teacher with other weights, in float64 throughout, which can be differentiated twice."""
    with float64_throughout(), sdpa_kernel(SDPBackend.MATH):
        yield sharp(), sharp(seed=1)


def losses(model: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, prior: Prior) -> dict[int, Tensor]:
    """Example id -> its loss."""
    found = prior.term().losses(model, batch, Layout.of(batch), teacher)
    return dict(zip(batch["example_id"].tolist(), found, strict=True))


def gradients(model: PreTrainedModel, loss: Tensor, **options: Any) -> Gradients:
    """∇ loss by parameter name."""
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), **options), strict=True))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"weight": -0.1}, "model.prior.weight is -0.1"),
        ({"weight": math.nan}, "model.prior.weight is nan"),
        ({"weight": math.inf}, "model.prior.weight is inf"),
        ({"fraction": 0.0}, "model.prior.fraction is 0.0"),
        ({"fraction": 1.01}, "model.prior.fraction is 1.01"),
        ({"fraction": math.nan}, "model.prior.fraction is nan"),
        ({"temperature": 0.0}, "model.prior.temperature is 0.0"),
        ({"temperature": -2.0}, "model.prior.temperature is -2.0"),
        ({"temperature": math.nan}, "model.prior.temperature is nan"),
        ({"temperature": math.inf}, "model.prior.temperature is inf"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], named: str) -> None:
    """Each refusal is one sentence with key and value, even while the prior is off."""
    with pytest.raises(UserError, match=rf"^{named}; give [^;]*\.$"):
        Prior(**options)


def test_an_unknown_confidence_is_refused() -> None:
    """With the value and those there are; the types, where they are checked at run time, refuse it even before."""
    with pytest.raises((UserError, TypeCheckError), match="'sure'") as refusal:
        Prior(confidence="sure")  # type: ignore[arg-type]
    assert all(confidence in str(refusal.value) for confidence in CONFIDENCES)


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"fraction": 1.0}, *({"confidence": c} for c in CONFIDENCES)])
def test_settings_at_the_edge_are_taken(options: dict[str, Any]) -> None:
    """No prior, the whole pool as anchors, and each of the three confidences."""
    Prior(**options)


@pytest.mark.parametrize(("fraction", "count"), [(1e-6, 1), (0.1, 4), (0.26, 11), (1.0, 42)])
@pytest.mark.parametrize("seed", [0, 3])
def test_anchors_are_a_share_of_the_pool(fraction: float, count: int, seed: int) -> None:
    """The fraction, rounded, but one at least; of the pool, each once, ascending, and the same at every call."""
    pool = list(range(5, 130, 3))
    drawn = Prior(fraction=fraction).term().draw(pool, seed)
    assert len(pool) == 42
    assert len(drawn) == count
    assert drawn == sorted(set(drawn) & set(pool))
    assert drawn == Prior(fraction=fraction, weight=3.0).term().draw(pool, seed)


def test_anchors_are_drawn_by_the_seed_and_apart_from_the_warm_up() -> None:
    """Another seed draws others; with the run's own seed the warm-up does not train on the anchors' very draw."""
    pool, prior = list(range(100)), Prior(fraction=0.3).term()
    draws = [prior.draw(pool, seed) for seed in range(4)]
    assert len({tuple(drawn) for drawn in draws}) == 4
    warm_ups = [Warmup(fraction=0.3).draw(pool, seed) for seed in range(4)]
    assert all(drawn != warm_up for drawn, warm_up in zip(draws, warm_ups, strict=True))
    assert set().union(*draws) > set(draws[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_losses_equal_the_loop_over_tokens(
    pair: tuple[PreTrainedModel, PreTrainedModel], confidence: Confidence, temperature: float, shape: str
) -> None:
    """τ² w KL of each example, whatever it is padded to or packed with, to float64's rounding; 0 without a response."""
    prior, examples = Prior(confidence=confidence, temperature=temperature), examples_with_a_bare_one()
    found = losses(*pair, SHAPES[shape](examples), prior)
    assert sorted(found) == list(range(6))
    for k, example in enumerate(examples):
        assert found[k].item() == pytest.approx(slow_prior(*pair, example, prior).item(), rel=1e-10)
    assert found[2].item() == 0
    assert all(found[k].item() > 0.1 for k in found if k != 2)


def test_confidences_differ(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """A loss is weighted as asked: by 1, or by less than 1, and not by the same."""
    batch = collate(make_examples())
    uniform, *others = ([x.item() for x in losses(*pair, batch, Prior(confidence=c)).values()] for c in CONFIDENCES)
    for weighted in others:
        assert all(0.05 * full < part < 0.6 * full for full, part in zip(uniform, weighted, strict=True))
    assert others[0] != pytest.approx(others[1], rel=0.05)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_gradients_equal_autograd_through_the_loop(
    pair: tuple[PreTrainedModel, PreTrainedModel], confidence: Confidence, shape: str
) -> None:
    """The sum of the losses has the sum of the gradients; the confidence, the teacher's alone, is a constant."""
    model, teacher = pair
    prior, examples = Prior(confidence=confidence), examples_with_a_bare_one()
    found = gradients(model, torch.stack(list(losses(*pair, SHAPES[shape](examples), prior).values())).sum())
    slow = torch.stack([slow_prior(model, teacher, example, prior) for example in examples]).sum()
    assert_same_gradients(found, gradients(model, slow), 1e-10)
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("at_the_base", [False, True])
def test_second_derivatives_equal_those_through_the_loop(
    pair: tuple[PreTrainedModel, PreTrainedModel], at_the_base: bool, shape: str
) -> None:
    """The Hessian along a direction is the reference's, also at the base model, where it is not zero."""
    model, teacher = pair
    teacher = model if at_the_base else teacher
    prior, examples, d = Prior(confidence="entropy_inv"), examples_with_a_bare_one(), random_direction(model)

    def along(loss: Tensor) -> Gradients:
        first = gradients(model, loss, create_graph=True)
        return gradients(model, torch.stack([(first[name] * d[name]).sum() for name in d]).sum())

    found = along(torch.stack(list(losses(model, teacher, SHAPES[shape](examples), prior).values())).sum())
    slow = along(torch.stack([slow_prior(model, teacher, example, prior) for example in examples]).sum())
    assert_same_gradients(found, slow, 1e-9)
    assert inner(found, d) > 0 if at_the_base else inner(found, d) != 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("own", [True, False], ids=["itself", "a copy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_zero_at_the_base_model(dtype: torch.dtype, own: bool, shape: str) -> None:
    """Where the weights are the base model's, as its own teacher or beside a copy, up to the rounding of the losses.

    What is small is measured by the same quantity at other weights.
    """
    model, other, prior = sharp(dtype), sharp(dtype, seed=1), Prior(temperature=1.5)
    batch, wide = SHAPES[shape](examples_with_a_bare_one()), torch.promote_types(dtype, torch.float32)
    eps = torch.finfo(wide).eps
    found, far = (
        torch.stack(list(losses(model, teacher, batch, prior).values()))
        for teacher in (model if own else sharp(dtype), other)
    )
    assert found.abs().max().item() < 50 * eps < 1e-3 * far[0].item()
    here, there = (gradients(model, loss.sum()) for loss in (found, far))
    size = max(float(g.abs().max()) for g in there.values())
    assert max(float(g.abs().max()) for g in here.values()) < 50 * eps * size


def test_bfloat16_models_give_float32_losses() -> None:
    """Probabilities are float32: the losses are those of the same weights in float64 but for the models' own rounding.

    bfloat16 has 8 bits, so logits are off by some hundredths of their size.
    """
    prior, batch = Prior(), collate(make_examples())
    model, teacher = (sharp(torch.bfloat16, seed) for seed in (0, 1))
    found = torch.stack(list(losses(model, teacher, batch, prior).values()))
    assert found.dtype == torch.float32
    exact = torch.stack(list(losses(model.double(), teacher.double(), batch, prior).values()))
    torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0)


def test_the_teacher_gets_no_gradient(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Nor is any graph made of it: the losses depend on the model's weights alone."""
    model, teacher = pair
    loss = torch.stack(list(losses(model, teacher, collate(make_examples()), Prior()).values())).sum()
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_a_frozen_model_has_losses_without_gradient(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Under no_grad, as when it is asked whether an example is finite alone, the losses are the same."""
    batch, prior = collate(make_examples()), Prior()
    expected = losses(*pair, batch, prior)
    with torch.no_grad():
        found = losses(*pair, batch, prior)
    assert [x.item() for x in found.values()] == [x.item() for x in expected.values()]
    assert not any(x.requires_grad for x in found.values())
