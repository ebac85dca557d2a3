from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.lr_scheduler import LinearLR
from transformers import PreTrainedModel

from dualsft.objectives import example_losses
from dualsft.training.compact import CompactParameters
from tests.world.data import random_batch, random_mask
from tests.world.models import tiny_llama

STEPS, ACCUMULATED = 6, 2
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0),
    "adamw-decay": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.3),
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True),
    "sgd-decay": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.3),
}
CLIPPERS: dict[str, Callable[[Any], object]] = {
    "none": lambda parameters: None,
    "norm": lambda parameters: clip_grad_norm_(parameters, 0.05),
    "value": lambda parameters: clip_grad_value_(parameters, 1e-3),
}


def add_gradients(model: PreTrainedModel, step: int, accumulated: int) -> None:
    """Backward over the batches of one step."""
    for part in range(accumulated):
        (example_losses(model, random_batch(3, 9, seed=100 * step + part)).mean() / accumulated).backward()


def train_dense(model: PreTrainedModel, mask: dict[str, Tensor], optimizer: str, clip: str, accumulated: int) -> None:
    """The reference: dense weights, gradients multiplied by the mask, unselected entries put back after each step."""
    weights = dict(model.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    stepper = OPTIMIZERS[optimizer](weights.values())
    schedule = LinearLR(stepper, 1.0, 0.1, STEPS)
    for step in range(STEPS):
        stepper.zero_grad()
        add_gradients(model, step, accumulated)
        for name, weight in weights.items():
            assert weight.grad is not None
            weight.grad.mul_(mask[name])
        CLIPPERS[clip](weights.values())
        stepper.step()
        schedule.step()
        with torch.no_grad():  # weight decay is for the selected entries alone
            for name, weight in weights.items():
                weight.copy_(torch.where(mask[name], weight, before[name]))


def train_compact(model: PreTrainedModel, mask: dict[str, Tensor], optimizer: str, clip: str, accumulated: int) -> None:
    """The same with compact parameters: an ordinary training loop over the masters."""
    compact = CompactParameters(model, mask)
    compact.attach()
    stepper = OPTIMIZERS[optimizer](compact.parameters())
    compact.write_back_after(stepper)
    schedule = LinearLR(stepper, 1.0, 0.1, STEPS)
    for step in range(STEPS):
        stepper.zero_grad()
        add_gradients(model, step, accumulated)
        CLIPPERS[clip](compact.parameters())
        stepper.step()
        schedule.step()


def mixed_mask(model: nn.Module) -> dict[str, Tensor]:
    """A mask with every kind of tensor: partly selected, wholly selected, not selected."""
    mask = random_mask(model, 0.3)
    mask["model.norm.weight"][:] = True
    mask["model.layers.0.mlp.up_proj.weight"][:] = True
    mask["model.layers.1.self_attn.k_proj.weight"][:] = False
    return mask


CASES = [
    (optimizer, clip, (1, ACCUMULATED)[(row + column) % 2], (row // 2 + column) % 2 == 0)
    for row, optimizer in enumerate(OPTIMIZERS)
    for column, clip in enumerate(CLIPPERS)
]
"""Every optimizer with every clipper, and with each of these either number of batches, and the head tied or not."""


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "clip", "accumulated", "tied"), CASES)
def test_equals_dense_training_with_masked_gradients(optimizer: str, clip: str, accumulated: int, tied: bool) -> None:
    """In float64 a compact step is the dense step under a masked gradient, to the last digits, schedule included."""
    dense, compact = tiny_llama(tied, torch.float64), tiny_llama(tied, torch.float64)
    mask = mixed_mask(dense)
    train_dense(dense, mask, optimizer, clip, accumulated)
    train_compact(compact, mask, optimizer, clip, accumulated)
    start, moved = tiny_llama(tied, torch.float64).state_dict(), 0.0
    for (name, expected), (_, found) in zip(dense.named_parameters(), compact.named_parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, msg=partial("{}: {}".format, name))
        moved = max(moved, float((found.detach() - start[name]).abs().max()))
    assert moved > 1e-5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw-decay", "sgd-momentum"])
def test_equals_dense_training_in_float32(optimizer: str, tied: bool) -> None:
    """In float32 the two differ by rounding alone: a thousandth of the size of the change at most."""
    dense, compact = tiny_llama(tied), tiny_llama(tied)
    start = tiny_llama(tied).state_dict()
    mask = mixed_mask(dense)
    train_dense(dense, mask, optimizer, "norm", ACCUMULATED)
    train_compact(compact, mask, optimizer, "norm", ACCUMULATED)
    for (name, expected), (_, found) in zip(dense.named_parameters(), compact.named_parameters(), strict=True):
        change = (expected - start[name]).detach().abs().max()
        assert (found - expected).abs().max() <= 1e-3 * change


def test_without_a_mask_equals_ordinary_training() -> None:
    """No mask trains all trainable weights, as an ordinary optimizer on them would; frozen ones stay."""
    ordinary, compact = tiny_llama(dtype=torch.float64), tiny_llama(dtype=torch.float64)
    compact.model.norm.weight.requires_grad_(False)
    everything = {name: torch.ones_like(w, dtype=torch.bool) for name, w in ordinary.named_parameters()}
    everything["model.norm.weight"][:] = False
    train_dense(ordinary, everything, "adamw", "none", 1)
    train_compact(compact, None, "adamw", "none", 1)  # type: ignore[arg-type]
    for expected, found in zip(ordinary.parameters(), compact.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_unselected_weights_keep_every_bit(tied: bool, dtype: torch.dtype) -> None:
    """Training changes selected entries and no others, weight decay or not."""
    model, start = tiny_llama(tied, dtype), dict(tiny_llama(tied, dtype).named_parameters())
    mask = mixed_mask(model)
    train_compact(model, mask, "adamw-decay", "none", 1)
    changed = 0
    for name, weight in model.named_parameters():
        assert torch.equal(weight[~mask[name]], start[name][~mask[name]])
        changed += int((weight != start[name]).sum())
    assert changed > 0.9 * sum(int(chosen.sum()) for chosen in mask.values())


def test_tensors_without_selected_entries_cost_no_gradient() -> None:
    """Autograd leaves out a tensor that is masked off or that the mask does not name."""
    model = tiny_llama(tied=False)
    name = "model.layers.0.self_attn.q_proj.weight"
    other = "model.layers.0.self_attn.k_proj.weight"
    mask = {name: torch.rand(32, 32) < 0.5, other: torch.zeros(16, 32, dtype=torch.bool)}
    compact = CompactParameters(model, mask)
    asked: list[str] = []
    for n, weight in model.named_parameters():
        if weight.requires_grad:
            weight.register_hook(lambda _, n=n: asked.append(n))
    compact.attach()
    example_losses(model, random_batch(2, 8)).mean().backward()
    assert compact.names == asked == [name]
    assert [n for n, weight in model.named_parameters() if weight.requires_grad] == [name]


def test_a_frozen_tensor_is_trained_where_the_mask_selects_it() -> None:
    """The mask decides, whatever an earlier use of the model has frozen."""
    model = tiny_llama()
    model.requires_grad_(False)
    compact = CompactParameters(model, {"model.norm.weight": torch.arange(32) < 3})
    compact.attach()
    example_losses(model, random_batch(2, 8)).mean().backward()
    assert compact.pending_gradients()[0].shape == (3,)


def test_no_dense_gradient_is_left() -> None:
    """After backward the gradients are on the masters alone, equal to the selected entries; after a step nowhere."""
    model, reference = tiny_llama(dtype=torch.float64), tiny_llama(dtype=torch.float64)
    mask = mixed_mask(model)
    compact = CompactParameters(model, mask)
    compact.attach()
    compact.attach()  # once is enough: twice must not fold twice
    optimizer = torch.optim.SGD(compact.parameters(), lr=0.1)
    compact.write_back_after(optimizer)
    for net in (model, reference):
        example_losses(net, random_batch(2, 8)).mean().backward()
    assert all(weight.grad is None for weight in model.parameters())
    weights = dict(reference.named_parameters())
    for name, gradient in zip(compact.names, compact.pending_gradients().values(), strict=True):
        dense = weights[name].grad
        assert dense is not None
        torch.testing.assert_close(gradient, dense[mask[name]], rtol=0, atol=1e-15)
    optimizer.step()
    assert compact.pending_gradients() == {}


def test_detached_parameters_leave_gradients_alone() -> None:
    """`detach` gives the model its ordinary gradients back."""
    model = tiny_llama()
    compact = CompactParameters(model)
    compact.attach()
    compact.detach()
    example_losses(model, random_batch(2, 8)).mean().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    assert compact.pending_gradients() == {}


def test_gradients_of_an_accumulation_can_be_carried_over() -> None:
    """Half an accumulation, put onto new compact parameters, goes on as if it had never been interrupted."""
    results = []
    for interrupted in (False, True):
        model = tiny_llama(dtype=torch.float64)
        compact = CompactParameters(model, mixed_mask(model))
        compact.attach()
        example_losses(model, random_batch(2, 8, seed=1)).mean().backward()
        if interrupted:
            gradients = compact.pending_gradients()
            model = tiny_llama(dtype=torch.float64)
            compact = CompactParameters(model, mixed_mask(model))
            compact.restore_gradients(gradients)
            compact.attach()
        example_losses(model, random_batch(2, 8, seed=2)).mean().backward()
        results.append(compact.pending_gradients())
    unbroken, resumed = results
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(unbroken[k], resumed[k]) for k in unbroken)


def test_indices_are_ascending_int32_and_absent_where_all_are_selected() -> None:
    """An index costs 4 bytes per selected weight, and nothing for a wholly selected tensor."""
    model = tiny_llama()
    mask = mixed_mask(model)
    compact = CompactParameters(model, mask)
    for k, name in enumerate(compact.names):
        index = compact.index(k)
        if mask[name].all():
            assert index is None
        else:
            assert index is not None
            assert index.dtype == torch.int32
            assert torch.equal(index.long(), mask[name].flatten().nonzero().squeeze(1))
    assert compact.index(compact.names.index("model.norm.weight")) is None
    assert compact.num_selected == sum(int(chosen.sum()) for chosen in mask.values())


def test_bfloat16_updates_are_not_lost() -> None:
    """1,000 steps of 1e-5 add up to 1e-2 in a bf16 weight of 0.02, where plain bf16 training stands still."""

    def thousand_steps(model: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(1000):
            optimizer.zero_grad()
            (-model.weight.float()).sum().backward()
            optimizer.step()

    plain, masked = (nn.Linear(4, 1, bias=False, dtype=torch.bfloat16) for _ in range(2))
    for model in (plain, masked):
        nn.init.constant_(model.weight, 0.02)
    start = plain.weight[0, 0].item()
    thousand_steps(plain, torch.optim.SGD(plain.parameters(), lr=1e-5))
    assert plain.weight.tolist() == [[start] * 4]
    compact = CompactParameters(masked, {"weight": torch.tensor([[True, False, True, False]])})
    compact.attach()
    optimizer = torch.optim.SGD(compact.parameters(), lr=1e-5)
    compact.write_back_after(optimizer)
    thousand_steps(masked, optimizer)
    assert compact.masters[0].dtype == torch.float32
    torch.testing.assert_close(compact.masters[0], torch.full((2,), start + 1e-2), rtol=1e-4, atol=0)
    expected = torch.tensor([[start + 1e-2, start, start + 1e-2, start]]).bfloat16()
    assert torch.equal(masked.weight, expected)


def test_a_weight_that_is_not_contiguous_is_trained_in_its_logical_order() -> None:
    """Flat indices count entries row by row, however the tensor lies in memory."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.arange(6.0).view(2, 3).t())
    mask = torch.tensor([[True, False], [False, False], [False, True]])
    compact = CompactParameters(model, {"weight": mask})
    compact.attach()
    optimizer = torch.optim.SGD(compact.parameters(), lr=1.0)
    compact.write_back_after(optimizer)
    gradient = torch.tensor([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]])
    (model.weight * gradient).sum().backward()
    optimizer.step()
    assert model.weight.tolist() == [[0 - 10, 3], [1, 4], [2, 5 - 60]]


def test_weights_follow_a_loaded_state() -> None:
    """Loading masters brings the model's weights to them at once."""
    trained, fresh = tiny_llama(dtype=torch.bfloat16), tiny_llama(dtype=torch.bfloat16)
    mask = mixed_mask(trained)
    train_compact(trained, mask, "adamw", "none", 1)
    state = CompactParameters(trained, mask).state_dict()
    assert all(name.startswith("masters.") for name in state)
    CompactParameters(fresh, mask).load_state_dict(state)
    for expected, found in zip(trained.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_fingerprint_tells_selections_apart() -> None:
    """Two selections of the same sizes differ in their fingerprint; the same selection has the same one."""
    first = torch.zeros(32, dtype=torch.bool)
    first[:5] = True
    second = first.roll(1)
    found = [CompactParameters(tiny_llama(), {"model.norm.weight": mask}).fingerprint for mask in (first, second)]
    assert found[0] != found[1]
    assert found[0] == CompactParameters(tiny_llama(seed=1), {"model.norm.weight": first}).fingerprint
    whole = CompactParameters(tiny_llama(), {"model.norm.weight": torch.ones(32, dtype=torch.bool)})
    assert whole.fingerprint not in found


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ({"no.such.weight": torch.ones(3, dtype=torch.bool)}, KeyError, "no.such.weight"),
        (
            {"model.norm.weight": torch.ones(31, dtype=torch.bool)},
            ValueError,
            r"model.norm.weight has shape \(31,\), the weight \(32,\)",
        ),
        ({"model.norm.weight": torch.zeros(32, dtype=torch.bool)}, ValueError, "no weight is selected"),
        ({}, ValueError, "no weight is selected"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: dict[str, Tensor], error: type[Exception], message: str) -> None:
    """An unknown name, a wrong shape and an empty mask are named at construction."""
    with pytest.raises(error, match=message):
        CompactParameters(tiny_llama(), mask)
