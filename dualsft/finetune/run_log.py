"""What a fit tells its loggers beside its losses: settings, the base model's validation, learning rate, throughput."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from dualsft.finetune.metrics_log import MetricsLog
from dualsft.selection.logged import logged


class LogRun(Callback):
    """Logs the settings and the selection as hyperparameters, and the base model's validation as step 0.

    With each training batch it logs ``lr``, the learning rate that its step takes, and ``tokens_per_second``, its
    supervised tokens by its wall time. A `MetricsLog` goes without the latter, so that a run that is repeated leaves
    the same file; the mean is in ``metrics.json``.

    Args:
        settings: The run's configuration.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = dict(settings)
        self._base: dict[str, Tensor] = {}
        self._rate = self._start = 0.0

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the base model's metrics; a resumed run would check a trained model."""
        if trainer.global_step == 0:
            metrics = trainer.callback_metrics.items()
            self._base = {name: value.clone() for name, value in metrics if name.startswith("val_")}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what holds for all of the run, and the base model's metrics."""
        selection = getattr(pl_module, "selection", None)
        chosen = {"selection": logged(selection.about)} if selection is not None else {}
        for logger in trainer.loggers:
            logger.log_hyperparams({**self._settings, **chosen})
            logger.save()
        if self._base and trainer.global_step == 0:
            trainer._logger_connector.log_metrics(self._base, step=0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the batch's clock, and note the rate before its schedule goes on."""
        self._start = time.perf_counter()
        self._rate = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the batch's learning rate and throughput, where its loss is logged."""
        rate = torch.tensor(self._rate, dtype=torch.float64)  # a float would be logged with float32's digits
        pl_module.log("lr", rate, batch_size=len(batch["example_id"]))
        if not trainer._logger_connector.should_update_logs:
            return
        tokens = int((batch["labels"] != -100).sum())
        metrics = {"tokens_per_second": tokens / max(time.perf_counter() - self._start, 1e-9)}
        for logger in trainer.loggers:
            if not isinstance(logger, MetricsLog):
                logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
