"""Losses in chunks of supervised tokens are those of whole logits; scores of them are in test_architectures.py."""

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from dualsft.data.layout import Batch, Layout
from dualsft.evaluation import LanguageModelMetrics
from dualsft.matrix.curvature import HessianVectorProduct, twice_differentiable
from dualsft.matrix.passes import gradient_pass
from dualsft.models.loading import checkpoint_activations
from dualsft.objectives import SelfDistillation, example_losses, supervised_losses
from dualsft.objectives.prior import Confidence
from dualsft.objectives.tail import body_path
from dualsft.training.compact import CompactParameters
from tests.cases import chunks_of, collate, given, make, make_examples, pack, random_direction
from tests.references import assert_same_gradients

EXAMPLES = make_examples()
PADDED, PACKED = collate(EXAMPLES), pack([[0, 3, 1], [2], [4]], EXAMPLES)
EXACT = 1e-12


def both(found: Callable[[], Any], tokens: int = 4) -> tuple[Any, Any]:
    """What a function returns in chunks, of which some are computed again, and with whole logits."""
    with chunks_of(tokens, 2 * tokens):
        chunked = found()
    return chunked, found()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """By name."""
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def logits_alive(model: Any, work: Callable[[], Any]) -> list[int]:
    """How many tokens the head is given at each call."""
    sizes: list[int] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, args, output: sizes.append(output[..., 0].numel()))
    work()
    handle.remove()
    return sizes


@pytest.mark.parametrize(("architecture", "batch"), [("llama tied", PADDED), ("gemma2", PACKED), ("bert", PADDED)])
def test_the_head_is_given_one_chunk_at_a_time(architecture: str, batch: Batch) -> None:
    """Again in backward but for those that are kept; losses and gradients are the same, also of one chunk alone."""
    model = make(architecture)
    count = int((batch["labels"][:, 1:] != -100).sum())

    def found() -> tuple[Tensor, dict[str, Tensor]]:
        losses = example_losses(model, batch)
        return losses.detach(), gradients(model, losses.square().sum())

    for tokens in (4, count):
        (losses, slopes), (expected, whole) = both(found, tokens)
        torch.testing.assert_close(losses, expected, rtol=EXACT, atol=0)
        assert_same_gradients(slopes, whole, 1e-11)
    full, rest = divmod(count, 4)
    sizes = [*([4] * full), *([rest] if rest else [])]
    for kept in (0, 10):
        with chunks_of(4, kept):
            again = [size for k, size in enumerate(sizes[:-1]) if 4 * k < count - kept]
            assert logits_alive(model, found) == [*sizes, *reversed(again)]
    assert logits_alive(model, found) == [batch["labels"].numel()]


def test_validation_and_the_prior_in_chunks() -> None:
    """Of every kind of confidence; metrics by token and by example."""
    model, teacher, layout = make("llama tied"), make("llama tied", seed=1), Layout.of(PADDED)
    for confidence in get_args(Confidence):
        term = SelfDistillation(1.0, 1.0, 2.0, confidence)
        losses, expected = both(partial(term.losses, model, PADDED, layout, teacher))
        torch.testing.assert_close(losses, expected, rtol=EXACT, atol=0)
        assert_same_gradients(gradients(model, losses.sum()), gradients(model, expected.sum()), 1e-11)

    def measured() -> dict[str, Tensor]:
        metrics = LanguageModelMetrics(by_example=True)
        metrics.measure(model, PADDED)
        return metrics.compute()

    torch.testing.assert_close(*both(measured), rtol=1e-6, atol=0)


@pytest.mark.parametrize("chosen", ["rows", "scattered"])
def test_chosen_weights_in_chunks(chosen: str) -> None:
    """Masters of a head, whose rows alone have a gradient or not, with recomputed activations, under autocast too."""
    model = make("llama", torch.float32).train()
    checkpoint_activations(model)
    weight = model.get_output_embeddings().weight
    mask = torch.zeros_like(weight, dtype=torch.bool)
    if chosen == "rows":
        mask[5:30] = True
    else:
        mask.view(-1)[::7] = True
    compact = CompactParameters(model, {"lm_head.weight": mask})
    compact.attach()

    def found(autocast: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            supervised_losses(model, PADDED).sum().backward()
        (master,) = compact.masters
        assert master.grad is not None
        gradient, master.grad = master.grad, None
        return gradient

    for autocast, relative in ((False, 1e-5), (True, 2e-2)):
        gradient, expected = both(partial(found, autocast))
        torch.testing.assert_close(gradient, expected, rtol=0, atol=relative * float(expected.abs().max()))


def test_products_with_the_hessian_in_chunks() -> None:
    """Twice differentiated."""
    model = make("gemma2")
    d = random_direction(model)

    def found() -> dict[str, Tensor]:
        with twice_differentiable(model):
            HessianVectorProduct(model, d)(example_losses(model, PADDED).sum())
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    with chunks_of(4):
        chunked = {name: g.clone() for name, g in found().items()}
    model.zero_grad()
    assert_same_gradients(chunked, found(), 1e-11)


@pytest.mark.parametrize("why", ["mixes tokens", "reads the ids", "calls no head"])
def test_a_model_without_a_tail_is_called_as_usual(why: str) -> None:
    """Its first call in chunks finds out, and its losses are those of whole logits from the first call on."""
    model: Any = make("llama")
    kind = type(model)

    class Other(kind):  # type: ignore[misc, valid-type]
        def forward(self, **inputs: Any) -> Any:
            if why == "calls no head":
                output = self.model(**inputs)
                return CausalLMOutput(logits=output.last_hidden_state @ self.lm_head.weight.t())
            output = kind.forward(self, **inputs)
            if why == "mixes tokens":
                output.logits = (output.logits + output.logits.roll(1, 1)) / 2
            else:
                output.logits = output.logits * (1 + inputs["input_ids"][..., None] / 100)
            return output

    model.__class__ = Other
    for _ in range(2):
        chunked, whole = both(lambda: example_losses(model, PADDED))
        torch.testing.assert_close(chunked, whole, rtol=EXACT, atol=0)
    assert body_path(model) == ""


def test_rows_of_a_single_token() -> None:
    """A chunk of one token has no axis that could be another."""
    model = make("llama")
    u = random_direction(model)
    chunked, whole = both(lambda: gradient_pass(model, given([PADDED]), directions=[u], by_token=True).rows[0], 1)
    assert chunked == pytest.approx(whole, rel=1e-9)
