"""What the prior's gradient pass holds at a time, teacher included, beside what scoring holds."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from dualsft.data.layout import Batch
from dualsft.matrix.passes import gradient_pass
from dualsft.selection.prior import Prior
from dualsft.selection.terms import Teacher
from tests.cases import llama, random_direction
from tests.matrix.test_memory import peak, weight_bytes
from tests.world.data import random_batch

SIZES = {"weights": (2, 6, 64), "logits": (10, 24, 1000)}
"""Examples of a batch, their tokens, and the vocabulary: what takes most of the memory."""


def deep_model(vocabulary: int, dtype: torch.dtype) -> PreTrainedModel:
    """Six layers, so that one of them is a small part of the whole."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "head_dim": 32}
    model: Any = llama(**sizes, vocab_size=vocabulary)
    made: PreTrainedModel = model.to(dtype).eval()
    return made


def batches(examples: int, tokens: int, vocabulary: int) -> Callable[[int], Iterator[Batch]]:
    """Three batches, each made when it is asked for."""

    def made(first: int) -> Iterator[Batch]:
        for k in range(first, 3):
            batch = random_batch(examples, tokens, seed=k, ragged=False)
            yield {**batch, "input_ids": batch["input_ids"] % vocabulary, "labels": batch["labels"].clamp(max=63)}

    return made


def distilling(model: PreTrainedModel, given: Callable[[int], Iterator[Batch]], untouched: bool) -> int:
    """The peak of the prior's gradient, from before its teacher is loaded."""
    teacher = Teacher(model, lambda: copy.deepcopy(model), untouched)
    prior = Prior(weight=1.0, confidence="entropy_inv").term()

    def work() -> None:
        with teacher.available() as base:
            gradient_pass(model, given, losses=lambda m, batch, layout: prior.losses(m, batch, layout, base))

    work()  # torch makes parts of itself when they are first used
    return peak(work)


def scoring(model: PreTrainedModel, given: Callable[[int], Iterator[Batch]]) -> int:
    """The peak of rows and columns of the same batches, from before the direction is made."""
    work = lambda: gradient_pass(model, given, directions=[random_direction(model)])  # noqa: E731
    work()
    return peak(work)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_the_prior_is_not_the_peak_of_a_run(size: str, dtype: torch.dtype) -> None:
    """Accumulator and teacher take no more than scoring's accumulator and direction, and what a batch has of logits.

    That is three times in float32: the teacher's logits, its probabilities, and the model's logits by the temperature.
    """
    examples, tokens, vocabulary = SIZES[size]
    model, given = deep_model(vocabulary, dtype), batches(examples, tokens, vocabulary)
    probabilities = int((next(given(0))["labels"][:, 1:] != -100).sum()) * vocabulary * torch.float32.itemsize
    few = probabilities // 100  # a number or two for each of these tokens
    assert distilling(model, given, untouched=False) <= scoring(model, given) + 3 * probabilities + few


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_would_show(dtype: torch.dtype) -> None:
    """The record sees a copy of the weights, and that there is none where the model is its own teacher."""
    model, given = deep_model(64, dtype), batches(*SIZES["weights"])
    own, copied = (distilling(model, given, untouched) for untouched in (True, False))
    assert copied - own == pytest.approx(weight_bytes(model) * dtype.itemsize / 4, rel=0.1)
