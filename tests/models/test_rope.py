"""Rotary frequencies that depend on the length of a sequence are each example's own, in any batch."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from dualsft.data.layout import Batch, one_example
from dualsft.matrix.passes import gradient_pass
from dualsft.models.rope import separate_frequencies
from dualsft.objectives import example_losses
from tests.cases import Example, collate, given, make, pack, random_direction
from tests.references import assert_rows, float64_throughout, gradient_loop

LENGTHS = [3, 20, 12, 30, 11]
ORIGINAL = 12
_SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def longrope() -> PreTrainedModel:
    """One set of frequencies up to 12 tokens, another beyond."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL, **factors}
    sizes: dict[str, Any] = {"max_position_embeddings": 64, "original_max_position_embeddings": ORIGINAL}
    return Phi3ForCausalLM(Phi3Config(**_SIZES, **sizes, rope_parameters=rope))


def dynamic() -> PreTrainedModel:
    """Frequencies of each length beyond 12 tokens."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return LlamaForCausalLM(LlamaConfig(**_SIZES, max_position_embeddings=ORIGINAL, rope_parameters=rope))


KINDS = {"longrope": longrope, "dynamic": dynamic}


def made(kind: str, separate: bool = True) -> PreTrainedModel:
    """A model of this kind in float64, of large weights, as a loader gives it or as the library does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = KINDS[kind]().double().eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.2)
    if separate:
        separate_frequencies(model)
    return model


def examples() -> list[Example]:
    """Examples on both sides of the original length."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 61, (length,), generator=generator).tolist() for length in LENGTHS]
    return [(of, [-100, *of[1:]]) for of in ids]


def alone(kind: str) -> list[float]:
    """Each example's loss with a model of the library that has seen no other."""
    batch = collate(examples())
    return [example_losses(made(kind, separate=False), one_example(batch, k)).item() for k in range(len(LENGTHS))]


BATCHES: dict[str, Batch] = {
    "padded": collate(examples()),
    "packed": pack([[3, 0], [1, 2], [4]], examples()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", BATCHES)
def test_losses_are_those_of_each_example_alone(kind: str, batch: str) -> None:
    """Padded or packed, whatever came before; the library's own model gives others."""
    model, expected = made(kind), alone(kind)
    for _ in range(2):
        losses = example_losses(model, BATCHES[batch])
        found = dict(zip(BATCHES[batch]["example_id"].tolist(), losses.tolist(), strict=True))
        assert [found[k] for k in range(len(LENGTHS))] == pytest.approx(expected, rel=1e-12)
    plain = example_losses(made(kind, separate=False), BATCHES["padded"])
    assert plain.tolist() != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_short_batches_after_long_ones_are_bit_for_bit_those_of_the_library(kind: str) -> None:
    """Up to the original length nothing changes, not even rounding."""
    short = {name: of[[0, 4], : LENGTHS[4]] for name, of in collate(examples()).items() if name != "example_id"}
    short["example_id"] = torch.tensor([0, 4])
    model = made(kind)
    example_losses(model, BATCHES["padded"])
    assert torch.equal(example_losses(model, short), example_losses(made(kind, separate=False), short))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_exact(kind: str) -> None:
    """Rows are the products with autograd's gradients of unpadded single examples, and pass the check against it."""
    with float64_throughout():
        model = made(kind)
        u = random_direction(model)
        found = gradient_pass(model, given([BATCHES["padded"]]), directions=[u])
        expected = gradient_loop(made(kind), examples())
        assert_rows([found.rows[0][k] for k in range(len(LENGTHS))], u, expected, 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_that_of_each_prompt_alone(kind: str) -> None:
    """Prompts padded on the left are answered as by themselves, across the original length."""
    model: Any = made(kind)
    ids = [of for of, _ in examples()]
    width = max(LENGTHS)
    padded = torch.tensor([[0] * (width - len(of)) + of for of in ids])
    mask = torch.tensor([[0] * (width - len(of)) + [1] * len(of) for of in ids])
    options: Any = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "use_cache": False}
    together = model.generate(input_ids=padded, attention_mask=mask, **options)[:, width:]
    for k, of in enumerate(ids):
        one = torch.tensor([of])
        single = model.generate(input_ids=one, attention_mask=torch.ones_like(one), **options)[:, len(of) :]
        assert torch.equal(together[k : k + 1], single)


def test_other_positions_stay_as_they_are() -> None:
    """A model without such frequencies is not touched."""
    model = make("llama")
    before = [type(module) for module in model.modules()]
    separate_frequencies(model)
    assert [type(module) for module in model.modules()] == before
    assert not model._forward_pre_hooks
