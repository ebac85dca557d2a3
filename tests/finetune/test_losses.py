"""What the training loss is the mean over."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dualsft.data.batches import TrainingBatches
from dualsft.data.layout import Batch, Layout, one_example
from dualsft.models.loading import load_model
from dualsft.objectives import token_losses
from dualsft.selection import load_selection
from tests.world.fits import weights
from tests.world.jobs import SaveOften, Workspace, trainer


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """An optimizer that the gradient's scale matters to."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.5)


def nll(model: Any, batch: Batch) -> list[Tensor]:
    """Of each example, computed alone: the losses of its supervised tokens."""
    alone = [one_example(batch, k) for k in range(len(Layout.of(batch).spans))]
    pairs = [token_losses(model(one["input_ids"]).logits, one["labels"]) for one in alone]
    return [losses[targets != -100] for losses, targets in pairs]


def examples_alike(model: Any, step: list[Batch]) -> Tensor:
    """The mean over batches, as if there were always four, of the mean over examples of their means."""
    means = [torch.stack([losses.mean() for losses in nll(model, batch)]).mean() for batch in step]
    return torch.stack(means).sum() / 4


def tokens_alike(model: Any, step: list[Batch]) -> Tensor:
    """The mean over all supervised tokens of a step's batches."""
    return torch.cat([losses for batch in step for losses in nll(model, batch)]).mean()


LOSSES: dict[str, Callable[[Any, list[Batch]], Tensor]] = {
    "example_mean": examples_alike,
    "token_mean": tokens_alike,
}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_steps_are_those_of_a_plain_loop(workspace: Workspace, folder: Path, loss: Any, packing: bool) -> None:
    """Each step follows the gradient of its loss over all its batches at once, the last, shorter step included."""
    options = {"packing": packing, "batch_size": 3}
    module = workspace.module(dtype="float64", optimizer=sgd, loss=loss)
    run = trainer(folder, accumulate_grad_batches=4, gradient_clip_val=1.5)
    run.fit(module, datamodule=workspace.data(**options))
    model, mask = load_model(workspace.model, "float64"), load_selection(workspace.selection).mask()
    optimizer, loader = sgd(model.parameters()), workspace.data(**options).train_dataloader()
    assert isinstance(loader.sampler, TrainingBatches)
    assert len(loader) % 4
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        for step in (batches[first : first + 4] for first in range(0, len(batches), 4)):
            optimizer.zero_grad()
            LOSSES[loss](model, step).backward()
            for name, weight in model.named_parameters():
                assert weight.grad is not None
                weight.grad.mul_(mask[name])
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.5)
            optimizer.step()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(
            weights(module)[name], weight.detach(), rtol=0, atol=1e-7
        )  # the model's norms are float32


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


def test_resuming_within_a_step(workspace: Workspace, folder: Path) -> None:
    """A checkpoint between two batches of a step keeps the count of its tokens: the weights are an unbroken run's."""
    found = []
    for resume in (None, "0-1", "0-3", "1-4"):
        module = workspace.module(optimizer=sgd, loss="token_mean")
        run = trainer(folder, accumulate_grad_batches=4, callbacks=[SaveOften(folder / str(resume))])
        path = folder / "None" / f"{resume}.ckpt" if resume else None
        run.fit(module, datamodule=workspace.data(batch_size=3), ckpt_path=path, weights_only=True)
        found.append(weights(module))
    assert all(torch.equal(found[0][name], resumed[name]) for resumed in found[1:] for name in resumed)
