"""Every optimizer of torch.optim on compact parameters, against dense tensors under masked gradients."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dualsft.errors import UserError
from dualsft.finetune.optimizers import make_optimizer
from dualsft.objectives import example_losses
from dualsft.training.compact import CompactParameters
from tests.world.data import random_batch, random_mask
from tests.world.models import tiny_llama

STEPS = 4
REFUSED = {"Muon": "only supports 2D parameters.* one vector", "SparseAdam": "sparse gradients alone.*give Adam"}
VECTORS = ["Adafactor"]
OPTIONS: dict[str, dict[str, Any]] = {
    "ASGD": {"t0": 1, "lambd": 0.1, "weight_decay": 0.1},
    "Adadelta": {"lr": 1.0, "weight_decay": 0.1},
    "Adagrad": {"lr_decay": 0.1, "weight_decay": 0.1},
    "Adam": {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"lr": 1e-2, "weight_decay": 0.3},
    "Adamax": {"weight_decay": 0.1},
    "LBFGS": {"lr": 0.5, "max_iter": 4},
    "NAdam": {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True},
    "RAdam": {"lr": 1e-2, "weight_decay": 0.1},
    "RMSprop": {"centered": True, "momentum": 0.9, "weight_decay": 0.1},
    "Rprop": {"lr": 1e-3},
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
}
NAMES = sorted(
    name
    for name, kind in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)
EQUAL = [name for name in NAMES if name not in (*REFUSED, *VECTORS)]
"""What this torch has, a later one's too: unless it is named above, it has to be equal."""


def factory(name: str) -> Callable[[Any], torch.optim.Optimizer]:
    """What the command line makes of a name and options."""
    return lambda parameters: getattr(torch.optim, name)(parameters, **OPTIONS.get(name, {}))


def loss_of(model: PreTrainedModel, step: int) -> Tensor:
    """The loss of one step's batch."""
    return example_losses(model, random_batch(2, 7, seed=step)).mean()


def mask_of(model: nn.Module) -> dict[str, Tensor]:
    """A third of the weights; one tensor whole."""
    mask = random_mask(model, 0.3)
    mask["model.norm.weight"][:] = True
    return mask


def put_back(weights: dict[str, nn.Parameter], mask: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Unselected entries as they were: neither decay nor state may move them."""
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(torch.where(mask[name], weight, values[name]))


def train_dense(model: PreTrainedModel, mask: dict[str, Tensor], name: str) -> None:
    """The reference: an ordinary loop over dense tensors, each gradient multiplied by its mask."""
    weights = dict(model.named_parameters())
    before = {n: weight.detach().clone() for n, weight in weights.items()}
    optimizer = factory(name)(weights.values())
    for step in range(STEPS):

        def closure(step: int = step) -> float:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            for n, weight in weights.items():
                assert weight.grad is not None
                weight.grad.mul_(mask[n])
            return loss.item()

        optimizer.step(closure)
        put_back(weights, mask, before)


def train_compact(model: PreTrainedModel, mask: dict[str, Tensor], name: str, positional: bool = False) -> None:
    """The same over the masters."""
    compact = CompactParameters(model, mask)
    compact.attach()
    optimizer = make_optimizer(factory(name), compact.parameters(), accumulated=1)
    compact.write_back_after(optimizer)
    for step in range(STEPS):

        def closure(step: int = step) -> float:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss.item()

        if positional:
            optimizer.step(closure)
        else:
            optimizer.step(closure=closure)


def furthest(first: nn.Module, second: nn.Module) -> float:
    """The largest difference between two models' weights."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", EQUAL)
def test_equals_dense_training_with_masked_gradients(name: str, tied: bool) -> None:
    """In float64 to the last digits, whatever state the optimizer keeps; no unselected weight changes a bit."""
    dense, compact, start = (tiny_llama(tied, torch.float64) for _ in range(3))
    mask = mask_of(dense)
    train_dense(dense, mask, name)
    train_compact(compact, mask, name, positional=tied)
    assert furthest(dense, compact) < 1e-12
    assert furthest(start, compact) > 1e-4
    for (n, weight), before in zip(compact.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(weight[~mask[n]], before[~mask[n]])


def test_adafactor_works_on_vectors(capsys: pytest.CaptureFixture[str]) -> None:
    """It is Adafactor on each tensor's selected entries as one vector, not on matrices, and says so."""
    dense, reference, compact = (tiny_llama(dtype=torch.float64) for _ in range(3))
    mask = mask_of(dense)
    train_compact(compact, mask, "Adafactor")
    assert "not factored" in capsys.readouterr().err
    weights = dict(reference.named_parameters())
    vectors = {n: nn.Parameter(weight.detach()[mask[n]]) for n, weight in weights.items()}
    optimizer = factory("Adafactor")(vectors.values())
    for step in range(STEPS):
        reference.zero_grad()
        loss_of(reference, step).backward()
        for n, weight in weights.items():
            assert weight.grad is not None
            vectors[n].grad = weight.grad[mask[n]]
        optimizer.step()
        with torch.no_grad():
            for n, weight in weights.items():
                weight[mask[n]] = vectors[n]
    assert furthest(reference, compact) < 1e-12
    train_dense(dense, mask, "Adafactor")
    assert furthest(dense, compact) > 1e-3


@pytest.mark.parametrize("name", [name for name in NAMES if name in REFUSED])
def test_what_cannot_work_is_refused(name: str) -> None:
    """An optimizer for matrices or sparse gradients is refused before the first step, in one sentence."""
    parameters: Iterable[nn.Parameter] = [nn.Parameter(torch.ones(3))]
    with pytest.raises(UserError, match=REFUSED[name]):
        make_optimizer(factory(name), parameters, accumulated=1)


def test_lbfgs_and_accumulation_are_refused() -> None:
    """Its evaluations within a step would add up their gradients."""
    with pytest.raises(UserError, match=r"LBFGS .*accumulate_grad_batches=2 .* set it to 1"):
        make_optimizer(factory("LBFGS"), [nn.Parameter(torch.ones(3))], accumulated=2)
