"""Sums of gradients on the host, in small pieces and by a thread that is late, beside those where the gradients are."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from dualsft.errors import UserError
from dualsft.matrix import host_sums, passes
from dualsft.matrix.passes import gradient_pass
from tests.cases import given, make, make_examples, random_direction
from tests.matrix.test_passes import EXPLOSIVE, batches_of, exploding_model, free_of, with_token
from tests.selection.test_warmup import Notebook
from tests.world.meta import meta_as_accelerator

BYTES = 200
"""Of a piece: less than nearly every gradient has."""


@pytest.fixture(autouse=True)
def late_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gradient comes in several pieces, which are added some time after backward has gone on."""
    add = host_sums._add

    def late(*arguments: Any) -> None:
        time.sleep(1e-4)
        add(*arguments)

    monkeypatch.setattr(host_sums, "_add", late)
    monkeypatch.setattr(host_sums, "PIECE", BYTES)


def assert_same(found: Any, expected: Any) -> None:
    """Two passes have the same bits."""
    assert found.rows == expected.rows
    assert found.nonfinite == expected.nonfinite
    assert all(torch.equal(total, expected.sums[name]) for name, total in found.sums.items())
    assert list(found.sums) == list(expected.sums)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(("architecture", "dtype"), [("llama tied", torch.bfloat16), ("gpt2", torch.float64)])
def test_the_bits_are_those_of_sums_on_the_device(architecture: str, dtype: torch.dtype, squared: bool) -> None:
    """Of gradients and of their squares, over several batches, in both orders in which a layer stores its weight."""
    model, batches = make(architecture, dtype), given(batches_of(make_examples(), 2))
    us = [] if squared else [random_direction(model)]
    found, expected = (
        gradient_pass(model, batches, directions=us, squared=squared, sums_on_host=on_host) for on_host in (True, False)
    )
    assert_same(found, expected)
    assert any(total.any() for total in found.sums.values())


def test_the_state_of_a_pass_holds_all_gradients_so_far() -> None:
    """Kept before each batch, it is that of sums on the device, and the pass goes on from it to the same bits."""
    model, batches = make("llama"), given(batches_of(make_examples(), 2))
    notebooks = [Notebook(due=True) for _ in range(2)]
    found, expected = (
        gradient_pass(model, batches, keeper=notebook, sums_on_host=on_host)
        for notebook, on_host in zip(notebooks, (True, False), strict=True)
    )
    assert_same(found, expected)
    for (tensors, notes), (others, other_notes) in zip(notebooks[0].notes, notebooks[1].notes, strict=True):
        assert notes == other_notes
        assert all(torch.equal(tensors[name], others[name]) for name in others)
    resumed = gradient_pass(model, batches, keeper=Notebook(notebooks[0].notes[1]), sums_on_host=True)
    assert_same(resumed, expected)


@pytest.mark.parametrize("model", [exploding_model(), exploding_model(dtype=torch.float32)])
def test_an_example_whose_gradient_is_not_finite_leaves_no_trace(model: Any) -> None:
    """It is found on the device, batch by batch, and the pass is repeated without it."""
    examples = free_of(EXPLOSIVE, (9, 4, 13, 5, 7, 6))
    examples[1] = with_token(examples[1], EXPLOSIVE)
    found, expected = (
        gradient_pass(model, given(batches_of(examples, 2)), sums_on_host=on_host) for on_host in (True, False)
    )
    assert found.nonfinite == {101}
    assert_same(found, expected)


@pytest.mark.parametrize(("squared", "what"), [(False, "The gradients"), (True, "The squares of gradients")])
def test_a_sum_that_overflows_is_refused(squared: bool, what: str) -> None:
    """Although each gradient is finite, as on the device."""
    model, examples = exploding_model(1e13 if squared else 1e10, torch.float32), free_of(EXPLOSIVE, (9, 9, 9, 9))
    batches = batches_of([with_token(example, EXPLOSIVE) for example in examples], 1)
    if not squared:
        gradient = gradient_pass(model, given(batches[:1]), sums_on_host=True).sums["model.embed_tokens.weight"]
        model = exploding_model(1e10 * (2e38 / float(gradient.abs().max())) ** 0.5, torch.float32)
        batches = batches[:1] * 4
    for on_host in (True, False):
        with pytest.raises(UserError, match=what if on_host else "overflow torch.float32 when added"):
            gradient_pass(model, given(batches), squared=squared, sums_on_host=on_host)


def test_the_accelerator_holds_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation is on tensors of both devices, and the sums are complete on the host."""
    model: Any = make("llama", torch.bfloat16)
    model = model.to("meta")
    u = {name: torch.empty_like(p) for name, p in model.named_parameters()}
    monkeypatch.setattr(passes, "spot_check", lambda *_: None)  # numbers differ
    batches = batches_of(make_examples(), 5)
    with meta_as_accelerator(monkeypatch):
        found = gradient_pass(model, given(batches), directions=[u], sums_on_host=True)
    assert {total.device.type for total in found.sums.values()} == {"cpu"}
    assert all(bool((total == len(batches)).all()) for total in found.sums.values())


def test_what_goes_wrong_in_the_thread_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass does not end with sums that lack a gradient."""

    def fail(*_: Tensor) -> None:
        raise RuntimeError("no such memory")

    monkeypatch.setattr(host_sums, "_add", fail)
    with pytest.raises(RuntimeError, match="no such memory"):
        gradient_pass(make("llama"), given(batches_of(make_examples(), 5)), sums_on_host=True)
