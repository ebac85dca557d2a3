"""Fits of the tiny workspace on any number of ranks, and what they leave to compare."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule
from lightning import Trainer as LightningTrainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor, distributed

from dualsft.finetune import FitReport, MaskedFinetuneModule
from dualsft.sharding.shards import full_tensor, local_shard
from dualsft.sharding.strategy import FSDP2
from tests.world.jobs import Workspace, trainer


def weights(module: MaskedFinetuneModule) -> dict[str, Tensor]:
    """A copy of the model's weights, all of each on every rank."""
    named = dict(module.model.named_parameters())
    return {name: full_tensor(local_shard(weight.detach()), weight).clone() for name, weight in named.items()}


@dataclass(frozen=True)
class Case:
    """Options of a fit: of its module, data, trainer and strategy, and what makes its callbacks, given its folder.

    Where this is a job of ranks, ``ranks`` makes the strategy.
    """

    module: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: Sequence[Callable[[Path], Callback]] = ()
    resume: Path | None = None
    strategy: dict[str, Any] = field(default_factory=dict)
    ranks: Callable[..., Strategy] = FSDP2


@dataclass
class Fitted:
    """What a fit leaves: each batch's loss, the weights, what was logged last, and the report's figures."""

    losses: list[float]
    weights: dict[str, Tensor]
    metrics: dict[str, float]
    figures: dict[str, Any]


class Losses(Callback):
    """Notes each batch's loss, or another of its `batch_losses`."""

    def __init__(self, metric: str = "train_loss") -> None:
        self._metric = metric
        self.found: list[float] = []

    def on_train_batch_end(
        self, trainer: LightningTrainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.found.append(float(cast(MaskedFinetuneModule, pl_module).batch_losses.latest[self._metric]))


class SaveFirst(Callback):
    """Saves what a run goes on from, with all of it restored, as ``restored.ckpt``."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._saved = folder, False

    def on_train_batch_start(
        self, trainer: LightningTrainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._saved:
            trainer.save_checkpoint(self._folder / "restored.ckpt")
        self._saved = True


def fitted(workspace: Workspace, folder: Path, case: Case) -> Fitted:
    """Fit on all ranks that there are."""
    module, losses, report = workspace.module(**case.module), Losses(), FitReport()
    callbacks = [losses, report, *(make(folder) for make in case.callbacks)]
    options: dict[str, Any] = {"enable_checkpointing": False, **case.trainer, "callbacks": callbacks}
    if distributed.is_initialized():
        options |= {"strategy": case.ranks(**case.strategy), "devices": distributed.get_world_size()}
    run = trainer(folder, **options)
    run.fit(module, datamodule=workspace.data(**case.data), ckpt_path=case.resume, weights_only=True)
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    return Fitted(losses.found, weights(module), metrics, report.figures(run, module))


def all_fitted(workspace: Workspace, folder: Path, cases: dict[str, Case]) -> dict[str, Fitted]:
    """Fits of several cases, each in a folder of its own."""
    return {name: fitted(workspace, folder / name, case) for name, case in cases.items()}


def assert_same_fit(found: Fitted, expected: Fitted, tolerance: float = 1e-5) -> None:
    """The losses of all batches, the weights, the metrics and what was counted are the same, but for rounding."""
    assert len(found.losses) == len(expected.losses)
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(expected.losses), rtol=0, atol=tolerance)
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=tolerance)
    assert found.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        assert abs(found.metrics[name] - value) <= 10 * tolerance * max(1.0, abs(value)), name
    for name in ("weights", "examples", "epochs", "steps", "exported_step", "tokens"):
        assert found.figures[name] == expected.figures[name], name
