"""Float32 weights, gradients and moments of all weights on the host, while the model is on an accelerator."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dualsft.matrix.pass_result import GradientPass
from dualsft.selection import offload
from dualsft.selection.combined_objective import CombinedObjective
from dualsft.selection.dense_training import DenseTraining
from dualsft.selection.offload import offloads_sums, offloads_training
from dualsft.selection.warmup import NAMES
from dualsft.training.compact import CompactParameters
from tests.cases import collate, make, make_examples
from tests.world.meta import meta_as_accelerator


def test_the_accelerator_holds_the_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes no operation on tensors of both devices, and leaves masters, moments and no gradient on the host."""
    model: Any = make("llama", torch.bfloat16)
    model = model.to("meta")
    with meta_as_accelerator(monkeypatch):
        training = DenseTraining(model, 1e-3, 0, NAMES, offload="always")
        assert list(training.steps([collate(make_examples())], 2)) == [1, 2]
        tensors, _ = training._state(0, 0, 0)
        moments = training.second_moment()
        assert {moment.device.type for moment in moments.values()} == {"cpu"}
    assert len(tensors) == 4 * len(list(model.parameters()))
    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}
    assert all(weight.is_meta and weight.grad is None for weight in model.parameters())


def test_gradients_are_complete_once_received() -> None:
    """Those of two batches add up to what masters beside the weights have; until then nothing is there."""
    found, expected = (CompactParameters(make("gpt2"), on_host=on_host) for on_host in (True, False))
    for compact in (found, expected):
        compact.attach()
        for value in (1.0, 2.0):
            sum((weight * value).sum() for weight in compact._weights).backward()  # type: ignore[union-attr]
            assert (compact.masters[0].grad is None) == (compact is found and value == 1.0)
            compact.receive()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(found.masters, expected.masters, strict=True))


@pytest.mark.parametrize(("free", "expected"), [(16, True), (22, False)])
def test_auto_goes_by_the_free_memory(
    free: int, expected: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """16 bytes for each weight are too many where they are more than three quarters of it; what was done is told."""
    model: Any = make("llama", torch.bfloat16)
    size = sum(weight.numel() for weight in model.parameters())
    monkeypatch.setattr(offload, "compute_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * size, 80 * size))
    assert not offloads_training("auto", model, "warm-up")  # shards on the host already need no more of the device
    model = model.to("meta")
    assert offloads_training("auto", model, "warm-up") == expected
    told = capsys.readouterr().err
    assert ("the warm-up holds" in told) == ("model.offload_optimizer never" in told) == expected
    assert offloads_training("always", model, "warm-up")
    assert not offloads_training("never", model, "warm-up")


@pytest.mark.parametrize(("free", "kept", "expected"), [(4, 0, True), (4, 2, False), (6, 0, False)])
def test_sums_go_to_the_host_where_they_leave_too_little(
    free: int, kept: int, expected: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """4 bytes for each weight that is scored; what torch keeps unused is free. Once memory has run out, they do go."""
    model: Any = make("llama", torch.bfloat16)
    model.get_input_embeddings().requires_grad_(False)
    size = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    monkeypatch.setattr(offload, "compute_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * size, 80 * size))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: (3 + kept) * size)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 3 * size)
    assert not offloads_sums("always", model, "scores")  # they are on the host
    model = model.to("meta")
    assert offloads_sums("auto", model, "scores") == expected
    told = capsys.readouterr().err
    assert ("in the scores gradients" in told) == ("model.offload_sums never" in told) == expected
    assert offloads_sums("auto", model, "scores", is_short=True)
    assert offloads_sums("always", model, "scores")
    assert not offloads_sums("never", model, "scores", is_short=True)


def test_sums_of_an_objective_stay_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their weighted sum, times P, is made on the accelerator, a tensor at a time."""
    model: Any = make("llama", torch.bfloat16)
    model = model.to("meta")
    ones = {name: torch.ones(weight.shape) for name, weight in model.named_parameters()}
    passes: Any = SimpleNamespace(run_unsaved=lambda *_, **__: GradientPass(dict(ones), counted=2))
    term: Any = SimpleNamespace(weight=1.0, kind="", examples=2, loader=None, phase=str, losses=nullcontext)
    unused: Any = None
    objective = CombinedObjective(model, passes, unused, unused, {"validation": term}, [], moments=ones)
    objective._sum = ones
    with meta_as_accelerator(monkeypatch):
        sums = objective._add(term)
        objective._precondition(sums)
    assert {name: (total.device.type, total.dtype) for name, total in sums.items()} == dict.fromkeys(
        ones, ("cpu", torch.float32)
    )
