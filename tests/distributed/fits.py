"""Fits of the tiny workspace on any number of ranks, and what they leave."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule
from lightning import Trainer as LightningTrainer
from torch import Tensor, distributed

from dualsft.distributed.sharding import local
from dualsft.distributed.shards import whole
from dualsft.distributed.strategy import FSDP2
from dualsft.finetune import MaskedFinetuneModule
from tests.finetune.runs import Workspace, trainer

Case = dict[str, dict[str, Any]]
"""Options of a fit's ``module``, ``data`` and ``trainer``; ``resume`` names a checkpoint."""


@dataclass
class Fitted:
    """What a fit leaves: each batch's loss, the weights, what was logged last, and the report's figures."""

    losses: list[float]
    weights: dict[str, Tensor]
    metrics: dict[str, float]


class Losses(Callback):
    """Notes each batch's loss."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(
        self, trainer: LightningTrainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.found.append(float(trainer.callback_metrics["train_loss"]))


def fitted(workspace: Workspace, folder: Path, case: Case, callbacks: list[Callback] | None = None) -> Fitted:
    """Fit on all ranks that there are, with weights in shards where this is a job of ranks."""
    several = distributed.is_initialized()
    module = workspace.module(**case.get("module", {}))
    losses = Losses()
    options: dict[str, Any] = {"callbacks": [losses, *(callbacks or [])], **case.get("trainer", {})}
    if several:
        options |= {"strategy": FSDP2(), "devices": distributed.get_world_size()}
    run = trainer(folder, **{"enable_checkpointing": False, **options})
    resume = case.get("resume", {}).get("path")
    run.fit(module, datamodule=workspace.data(**case.get("data", {})), ckpt_path=resume, weights_only=True)
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    return Fitted(losses.found, whole_weights(module), metrics)


def whole_weights(module: MaskedFinetuneModule) -> dict[str, Tensor]:
    """A copy of the model's weights."""
    named = dict(module.model.named_parameters())
    return {name: whole(local(weight.detach()), weight).clone() for name, weight in named.items()}


def all_fitted(workspace: Workspace, folder: Path, cases: dict[str, Case]) -> dict[str, Fitted]:
    """Fits of several cases."""
    return {name: fitted(workspace, folder, case) for name, case in cases.items()}
