"""Optimizers and learning rate schedules as the command line gives them."""

import csv
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from safetensors.torch import load_file
from torch.optim import lr_scheduler

from dualsft.errors import UserError
from dualsft.models.loading import load_model
from dualsft.objectives import example_losses
from dualsft.selection import load_selection
from tests.world.fits import weights
from tests.world.jobs import Workspace, fit, trainer

STEPS = 6  # three epochs of two batches
SCHEDULES: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "StepLR": ({"step_size": 4, "gamma": 0.5}, lambda o: lr_scheduler.StepLR(o, 4, 0.5)),
    "CosineAnnealingLR": ({"T_max": STEPS}, lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS)),
    "LinearLR": (
        {"start_factor": 0.1, "total_iters": 4},
        lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    ),
    "OneCycleLR": (
        {"max_lr": 0.01, "total_steps": STEPS},
        lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=STEPS),
    ),
    "ReduceLROnPlateau": (
        {"monitor": "val_loss", "mode": "max", "patience": 0, "factor": 0.5},
        lambda o: lr_scheduler.StepLR(o, 4, 0.5),  # the loss falls, which is no rise: from the second epoch's end on
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_by_command_line(workspace: Workspace, folder: Path, name: str) -> None:
    """The rate of every step is that of torch's schedule, stepped once per optimizer step (on a metric: per epoch)."""
    options, make = SCHEDULES[name]
    given = ["--optimizer", "SGD", "--optimizer.lr", "0.003", "--lr_scheduler", name]
    given += [part for key, value in options.items() for part in (f"--lr_scheduler.{key}", str(value))]
    monitor = ["--trainer.callbacks+", "LearningRateMonitor", "--trainer.callbacks.logging_interval", "step"]
    fit(workspace, folder, *given, *monitor, "--trainer.log_every_n_steps", "1")
    with open(folder / "logs" / "version_0" / "metrics.csv", encoding="utf-8") as stream:
        found = [float(row["lr-SGD"]) for row in csv.DictReader(stream) if row["lr-SGD"]]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.003)
    schedule, expected = make(optimizer), []
    for _ in range(STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(set(found)) > 1


def test_a_cycle_shorter_than_the_run_is_refused(workspace: Workspace, folder: Path) -> None:
    """OneCycleLR would fail at the step behind its last: it is said at the start, with the number it takes."""
    cycle = ["--lr_scheduler", "OneCycleLR", "--lr_scheduler.max_lr", "0.1", "--lr_scheduler.total_steps"]
    with pytest.raises(UserError, match="total_steps is 5, but the run has 6 optimizer steps"):
        fit(workspace, folder, *cycle, "5", "--optimizer", "AdamW")
    assert not folder.exists()


def test_lbfgs_under_a_schedule_of_accumulation_is_refused(workspace: Workspace, folder: Path) -> None:
    """From a later epoch on a step would have several batches, which is as good a reason as from the first."""
    schedule = GradientAccumulationScheduler({1: 3})
    run = trainer(folder, enable_checkpointing=False, callbacks=[schedule])
    with pytest.raises(UserError, match="accumulate_grad_batches=3 has no meaning"):
        run.fit(workspace.module(optimizer=torch.optim.LBFGS), datamodule=workspace.data())


@pytest.mark.parametrize(("name", "words"), [("Muon", "one vector"), ("SparseAdam", "give Adam")])
def test_optimizers_that_cannot_work_leave_no_trace(workspace: Workspace, folder: Path, name: str, words: str) -> None:
    """They are refused in one sentence and leave the folder free."""
    with pytest.raises(UserError, match=words):
        fit(workspace, folder, "--optimizer", name, "--optimizer.lr", "0.1")
    assert not folder.exists()


@pytest.mark.parametrize(("clip", "evaluations"), [(None, 4), (0.5, 2)])
def test_lbfgs_under_the_trainer(workspace: Workspace, folder: Path, clip: float | None, evaluations: int) -> None:
    """Each of its evaluations within a step sees its trial: it equals a plain loop, clipping included."""
    lbfgs = lambda parameters: torch.optim.LBFGS(parameters, lr=0.5, max_iter=evaluations, max_eval=9)  # noqa: E731
    module, data = workspace.module(dtype="float64", optimizer=lbfgs), workspace.data()
    trainer(folder, max_epochs=1, limit_train_batches=2, gradient_clip_val=clip).fit(module, datamodule=data)
    model, mask = load_model(workspace.model, "float64"), load_selection(workspace.selection).mask()
    optimizer = lbfgs(model.parameters())
    for batch in islice(workspace.data().train_dataloader(), 2):

        def closure(batch: Any = batch) -> torch.Tensor:
            optimizer.zero_grad()
            loss = example_losses(model, batch).mean()
            loss.backward()
            for name, weight in model.named_parameters():
                assert weight.grad is not None
                weight.grad.mul_(mask[name])
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
            return loss

        optimizer.step(closure)
    expected = {name: weight.detach() for name, weight in model.named_parameters()}
    for name, weight in weights(module).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-10)  # its inner products amplify rounding


@pytest.mark.slow
def test_averaging_by_command_line(workspace: Workspace, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exported model, and the delta, hold the averages, without a word about a memory that is not used."""
    plain, given = folder / "plain", ["--optimizer", "SGD", "--optimizer.lr", "0.1"]
    fit(workspace, plain, *given)
    callback = ["--trainer.callbacks+", "EMAWeightAveraging", "--trainer.callbacks.decay", "0.0"]
    fit(workspace, folder / "latest", *given, *callback)
    fit(workspace, folder / "average", *given, *callback[:-1], "0.9")
    assert "WeightAveraging" not in capsys.readouterr().err
    for name in ("model/model.safetensors", "delta.safetensors"):
        last, latest, average = (load_file(folder / run / name) for run in ("plain", "latest", "average"))
        assert all(torch.equal(last[key], latest[key]) for key in last)
        assert any(not torch.equal(last[key], average[key]) for key in last)
