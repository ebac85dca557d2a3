"""The figures of a fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback

from dualsft.data.layout import Layout
from dualsft.finetune import FitReport, report
from tests.world.jobs import SaveOften, Workspace, trainer

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


class Watching(Callback):
    """Counts for itself."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.examples = self.tokens = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)
        self.examples += len(Layout.of(batch).spans)
        self.tokens += int(sum((row != -100).sum() for row in batch["labels"]))


def figures(workspace: Workspace, folder: Path, resume: Path | None = None, epochs: int = 2, **data: Any) -> Any:
    """The figures of a run, and what was counted in it."""
    told, watching, module = FitReport(), Watching(), workspace.module()
    callbacks = [watching, told, SaveOften(folder)]
    run = trainer(
        folder, max_epochs=epochs, callbacks=callbacks, accumulate_grad_batches=2, num_sanity_val_steps=-1
    )  # fmt: skip
    run.fit(module, datamodule=workspace.data(**data), ckpt_path=resume, weights_only=True)
    return told.figures(run, module), watching


@pytest.mark.parametrize("packing", [False, True])
def test_figures_are_those_of_the_batches(workspace: Workspace, folder: Path, packing: bool) -> None:
    """Examples, tokens, steps and losses are those that passed, padded or packed."""
    found, watched = figures(workspace, folder, packing=packing)
    batches = len(watched.losses)
    assert found["examples"] == {"each_epoch": 17, "passed": watched.examples}
    assert watched.examples == 34
    assert found["tokens"] == watched.tokens
    half = batches // 2
    assert found["train_loss"]["batches"] == half
    assert found["train_loss"]["first"] == pytest.approx(sum(watched.losses[:half]) / half, rel=1e-6)
    assert found["train_loss"]["last"] == pytest.approx(sum(watched.losses[-half:]) / half, rel=1e-6)
    assert (found["epochs"], found["steps"]) == (2, found["validation"]["step"])
    assert found["weights"] == {"trained": 7339, "all": 25120}
    assert 0 < found["tokens"] / found["tokens_per_second"] < found["seconds"]


def test_longer_runs_tell_of_ten_batches(workspace: Workspace, folder: Path) -> None:
    """However long a run is, its checkpoints keep twenty losses."""
    found, watched = figures(workspace, folder, epochs=5)
    assert found["train_loss"]["batches"] == 10
    assert found["train_loss"]["last"] == pytest.approx(sum(watched.losses[-10:]) / 10, rel=1e-6)
    state = torch.load(folder / "4-4.ckpt", weights_only=True)["callbacks"]["FitReport"]
    assert len(state["first"]) == len(state["last"]) == 10


def test_a_resumed_run_tells_of_the_whole(workspace: Workspace, folder: Path) -> None:
    """From a checkpoint in mid-epoch the figures are those of the unbroken run, but for what it cost."""
    # saved after the report has counted the batch, as Lightning's own checkpoints are
    unbroken, _ = figures(workspace, folder)
    for checkpoint in ("0-2", "1-1"):
        resumed, _ = figures(workspace, folder / "again", folder / f"{checkpoint}.ckpt")
        costs = ("seconds", "tokens_per_second", "peak_memory_bytes")
        assert {k: v for k, v in resumed.items() if k not in costs} == {
            k: v for k, v in unbroken.items() if k not in costs
        }


def test_report_without_validation(workspace: Workspace, folder: Path) -> None:
    """There is no table then, and no step that would be compared."""
    found, _ = figures(workspace, folder, validation=None)
    assert found["validation"] == {"base": None, "step": None, "metrics": None}
    lines = report(found).splitlines()
    assert lines[0].startswith("train loss  ")
    assert "weights     7,339 of 25,120 trained (29.2%)" in lines
