"""What an accelerator demands of a pass, shown without one."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from dualsft.data.layout import Layout, one_example
from dualsft.matrix import linear_tap, passes, spot_check
from dualsft.matrix.passes import gradient_pass
from dualsft.matrix.sketches import LOSS, Measurement
from dualsft.objectives import SelfDistillation
from dualsft.objectives.base_logits import BaseLogits
from dualsft.selection.passes import scoring_mode
from tests.cases import chunks_of, collate, given, make, make_examples, pack, random_direction
from tests.world.meta import meta_as_accelerator

WAYS: dict[str, dict[str, Any]] = {
    "rows and columns": {"measurement": Measurement((LOSS,))},
    "rows alone": {"columns": False},
    "by token": {"by_token": True},
}


@pytest.mark.parametrize(
    ("architecture", "packed", "way"),
    [
        ("llama", False, "rows and columns"),
        ("llama", True, "by token"),
        ("gpt2", True, "rows and columns"),
        ("mixtral", False, "by token"),
        ("mixtral", True, "rows alone"),
    ],
)
def test_no_operation_takes_tensors_of_two_devices(
    architecture: str, packed: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a batch on the host to scores on the host, whichever way linear layers take; spot checks too."""
    examples = make_examples()
    batch = pack([[0, 1], [2, 3, 4]], examples) if packed else collate(examples)
    model: Any = make(architecture, torch.bfloat16)
    model = model.to("meta")
    u = {name: torch.empty_like(p) for name, p in model.named_parameters()}
    monkeypatch.setattr(linear_tap, "by_gradient_pays", lambda *_: packed)
    monkeypatch.setattr(passes, "spot_check", lambda *_: None)  # numbers differ
    with meta_as_accelerator(monkeypatch):
        found = gradient_pass(model, given([batch]), directions=[u], **WAYS[way])
        if way == "rows alone":
            spot_check._products_alone(model, [u], one_example(batch, 0))
    assert len(found.rows[0]) == len(examples)
    assert all(total.is_meta for total in found.sums.values())


def test_the_logits_of_a_prior_are_kept_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the base model, from where a chunk at a time is compared with; a small batch's stay where they are."""
    here = collate(make_examples())
    layout, batch = Layout.of(here), {name: tensor.to("meta") for name, tensor in here.items()}
    models: list[Any] = [make("llama", torch.bfloat16, seed) for seed in range(2)]
    student, teacher = (model.to("meta") for model in models)
    with meta_as_accelerator(monkeypatch):
        assert BaseLogits(teacher, batch).at(slice(2), torch.device("meta")).is_meta
        with chunks_of(1):
            kept = BaseLogits(teacher, batch)
            prior = SelfDistillation(1.0, 1.0, 2.0, "max_prob")
            prior.divergences(student, batch, layout, kept).sum().backward()
    assert kept._kept.device.type == "cpu"


def test_an_operation_on_two_devices_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which meta tensors alone would not do: torch lets many operations pass; a number on the host is none."""
    with meta_as_accelerator(monkeypatch):
        there = torch.ones(2, 3, device="meta")
        assert bool((there + torch.tensor(1.0)).sum().isfinite())
        with pytest.raises(AssertionError, match="index"):
            there[torch.tensor([0, 1])]


@pytest.mark.parametrize(("architecture", "checkpointing"), [("llama", True), ("gpt2", False), ("mixtral", True)])
def test_backward_may_run_in_a_thread_of_its_own(architecture: str, checkpointing: bool) -> None:
    """As autograd's does for each accelerator: the same bits, whatever a thread does not take over from another."""
    model, batch = make(architecture), collate(make_examples())
    u = random_direction(model)

    def in_thread(loss: Tensor) -> None:
        failures: list[BaseException] = []

        def backward() -> None:
            try:
                loss.backward()
            except BaseException as error:  # told by the thread that waits
                failures.append(error)

        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]

    with scoring_mode(model, checkpointing):
        here = gradient_pass(model, given([batch]), directions=[u])
        there = gradient_pass(model, given([batch]), directions=[u], derivative=in_thread)
    assert there.rows == here.rows
    assert all(torch.equal(total, here.sums[name]) for name, total in there.sums.items())
