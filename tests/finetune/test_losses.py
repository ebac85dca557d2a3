"""What the training loss is the mean over."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor

from dualsft.data.batches import TrainingBatches
from dualsft.data.layout import Batch, Layout, one_example
from dualsft.errors import UserError
from dualsft.models.loading import load_model
from dualsft.objectives import token_losses
from dualsft.selection import load_selection
from tests.world.fits import weights
from tests.world.jobs import CHOSEN, SaveOften, Workspace, save_selection, trainer


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """An optimizer that the gradient's scale matters to."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.5)


def nll(model: Any, batch: Batch) -> list[Tensor]:
    """Of each example, computed alone: the losses of its supervised tokens."""
    alone = [one_example(batch, k) for k in range(len(Layout.of(batch).spans))]
    pairs = [token_losses(model(one["input_ids"]).logits, one["labels"]) for one in alone]
    return [losses[targets != -100] for losses, targets in pairs]


def examples_alike(model: Any, step: list[Batch]) -> Tensor:
    """The mean over a step's batches of the mean over examples of their means."""
    means = [torch.stack([losses.mean() for losses in nll(model, batch)]).mean() for batch in step]
    return torch.stack(means).mean()


def tokens_alike(model: Any, step: list[Batch]) -> Tensor:
    """The mean over all supervised tokens of a step's batches."""
    return torch.cat([losses for batch in step for losses in nll(model, batch)]).mean()


LOSSES: dict[str, Callable[[Any, list[Batch]], Tensor]] = {
    "example_mean": examples_alike,
    "token_mean": tokens_alike,
}


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A rate that falls with every step."""
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


@dataclass
class Steps:
    """How the batches of a fit's epochs become steps, in Lightning's terms."""

    accumulated: tuple[int, int] = (4, 4)  # in the first epoch, and in later ones
    limit: int | None = None
    max_steps: int = -1

    def of(self, batches: list[Batch], epoch: int) -> list[list[Batch]]:
        """The steps of an epoch of so many batches."""
        count = self.accumulated[min(epoch, 1)]
        batches = batches[: self.limit]
        return [batches[first : first + count] for first in range(0, len(batches), count)]

    def options(self) -> dict[str, Any]:
        """The trainer's."""
        limits: dict[str, Any] = {"limit_train_batches": self.limit, "max_steps": self.max_steps}
        first, later = self.accumulated
        if first == later:
            return {"accumulate_grad_batches": first, **limits}
        return {"callbacks": [GradientAccumulationScheduler({0: first, 1: later})], **limits}


STEPS = {
    "none left over": Steps(limit=4),
    "one left over": Steps(limit=5),
    "two left over": Steps(),
    "three left over": Steps(limit=3),
    "cut by max_steps": Steps(limit=5, max_steps=3),
    "schedule": Steps((4, 5)),
}


def plain_loop(workspace: Workspace, loss: str, steps: Steps, **data: Any) -> tuple[dict[str, Tensor], int]:
    """The weights after two epochs of dense gradient steps, masked, each by autograd over all of its batches."""
    model, mask = load_model(workspace.model, "float64"), load_selection(workspace.selection).mask()
    optimizer, loader = sgd(model.parameters()), workspace.data(**data).train_dataloader()
    schedule, taken = halving(optimizer), 0
    assert isinstance(loader.sampler, TrainingBatches)
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for step in steps.of(list(loader), epoch):
            if taken == steps.max_steps:
                break
            optimizer.zero_grad()
            LOSSES[loss](model, step).backward()
            for name, weight in model.named_parameters():
                assert weight.grad is not None
                weight.grad.mul_(mask[name])
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.5)
            optimizer.step()
            schedule.step()
            taken += 1
    return {name: weight.detach() for name, weight in model.named_parameters()}, taken


@pytest.mark.parametrize(
    ("loss", "steps", "packing"),
    [(loss, steps, False) for loss in LOSSES for steps in STEPS] + [(loss, "two left over", True) for loss in LOSSES],
)
def test_steps_are_those_of_a_plain_loop(
    workspace: Workspace, folder: Path, loss: Any, steps: str, packing: bool
) -> None:
    """Each step follows the mean over its own batches, clipped, however many there are; steps and rates stay."""
    options = {"packing": packing, "batch_size": 3}
    module = workspace.module(dtype="float64", optimizer=sgd, lr_scheduler=halving, loss=loss)
    run = trainer(folder, enable_checkpointing=False, gradient_clip_val=1.5, **STEPS[steps].options())
    run.fit(module, datamodule=workspace.data(**options))
    expected, taken = plain_loop(workspace, loss, STEPS[steps], **options)
    assert run.global_step == taken
    assert run.optimizers[0].param_groups[0]["lr"] == 0.1 * 0.5**taken
    found = weights(module)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-7)  # the model's norms are float32


def trained(workspace: Workspace, folder: Path, loss: str, accumulated: int, **data: Any) -> dict[str, Tensor]:
    """The weights after two epochs of one step each."""
    module = workspace.module(dtype="float64", optimizer=sgd, loss=loss)
    run = trainer(folder, accumulate_grad_batches=accumulated)
    run.fit(module, datamodule=workspace.data(batch_tokens=4000, **data))
    assert run.global_step == 2
    return weights(module)


def test_accumulated_tokens_weigh_as_in_one_batch(workspace: Workspace, folder: Path) -> None:
    """By tokens, small batches make the step of one big batch; by examples, in unequal batches, they do not."""
    for loss, equal in (("token_mean", True), ("example_mean", False)):
        big = trained(workspace, folder, loss, 1, batch_size=17)
        small = trained(workspace, folder, loss, 7, batch_size=3)
        difference = max(float((big[name] - small[name]).abs().max()) for name in big)
        assert (difference < 1e-7) == equal
        assert equal or difference > 1e-4


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_batches_weigh_as_in_one_batch(workspace: Workspace, folder: Path, loss: str) -> None:
    """An epoch of fewer batches than a step accumulates makes the step of one big batch, by either mean."""
    one = save_selection(folder / "one", workspace, load_selection(workspace.selection).mask(), CHOSEN[:16])
    big, small = (
        trained(replace(workspace, selection=one), folder, loss, accumulated, batch_size=size)
        for accumulated, size in ((1, 16), (7, 4))
    )
    assert all(torch.allclose(big[name], small[name], rtol=0, atol=1e-7) for name in big)


def resumed(workspace: Workspace, folder: Path, steps: Steps, loss: Any, path: Path | None) -> dict[str, Tensor]:
    """The weights of a fit that saves a checkpoint after every batch, unbroken or from such a checkpoint."""
    options = {"enable_checkpointing": False, **steps.options()}
    options["callbacks"] = [SaveOften(folder), *options.get("callbacks", [])]
    module = workspace.module(optimizer=sgd, loss=loss)
    trainer(folder, **options).fit(module, datamodule=workspace.data(batch_size=3), ckpt_path=path, weights_only=True)
    return weights(module)


@pytest.mark.parametrize(
    ("loss", "steps", "places"),
    [
        ("token_mean", "two left over", ("0-1", "0-3", "1-4")),
        ("example_mean", "two left over", ("0-4", "1-4")),
        ("example_mean", "schedule", ("0-2", "1-1", "1-4")),
    ],
)
def test_resuming_within_a_step(
    workspace: Workspace, folder: Path, loss: str, steps: str, places: tuple[str, ...]
) -> None:
    """A checkpoint between two batches of a step keeps what they weigh: the weights are an unbroken run's."""
    unbroken = resumed(workspace, folder / "unbroken", STEPS[steps], loss, None)
    for place in places:
        found = resumed(workspace, folder / place, STEPS[steps], loss, folder / "unbroken" / f"{place}.ckpt")
        assert all(torch.equal(unbroken[name], found[name]) for name in unbroken), place


def test_a_step_is_not_resumed_as_another(workspace: Workspace, folder: Path) -> None:
    """With another number of batches to a step, the gradients so far would be dropped or weigh as others."""
    resumed(workspace, folder, Steps(), "example_mean", None)
    with pytest.raises(UserError, match=r"a run with 4, and trainer\.accumulate_grad_batches is 2 now; resume as"):
        resumed(workspace, folder / "again", Steps((2, 2)), "example_mean", folder / "0-1.ckpt")
    resumed(workspace, folder / "again", Steps((2, 2)), "example_mean", folder / "0-3.ckpt")  # between two steps
    state = torch.load(folder / "0-1.ckpt", weights_only=True)
    state["dualsft"]["step"] = {"first": 0, "tokens": 0}
    torch.save(state, folder / "old.ckpt")
    with pytest.raises(UserError, match=r"by an earlier release"):
        resumed(workspace, folder / "again", Steps(), "example_mean", folder / "old.ckpt")
