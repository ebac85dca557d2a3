"""`dualsft fit`: fine-tune the chosen weights on the chosen examples."""

import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningModule
from lightning import Trainer as LightningTrainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LRSchedulerTypeTuple
from torch.optim import Optimizer

from dualsft.commands.lightning_cli import VerbCLI, tell
from dualsft.commands.messages import refused
from dualsft.errors import UserError
from dualsft.finetune import (
    EndOfTraining,
    ExportModel,
    FitReport,
    MaskedFinetuneModule,
    RecentCheckpoint,
    best_checkpoint,
    check_trainer,
    report,
)
from dualsft.finetune.checkpoint_files import checkpoint_files, newest_whole
from dualsft.finetune.metrics_log import ContinueMetrics, MetricsLog
from dualsft.finetune.run_log import LogRun
from dualsft.runs.folder import RunFolder
from dualsft.runs.loggers import LOGS, make_loggers
from dualsft.selection.overlap import tell_of_data
from dualsft.sharding.collectives import is_rank_zero, on_rank_zero
from dualsft.sharding.strategy import launch_ranks
from dualsft.storage.paths import expanded
from dualsft.storage.writing import write_atomically

DECISIVE = ("seed_everything", "model", "data", "optimizer", "lr_scheduler")
"""Settings that a resumed run must share with the run that it resumes."""
INDIFFERENT = ("cache_dir", "encoding_processes")
"""Those of the data that are none."""


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a resumed run must share; where and by how many its data are encoded is none of them."""
    found = {key: settings.get(key) for key in DECISIVE}
    if isinstance(data := found["data"], Mapping):
        found["data"] = {key: value for key, value in data.items() if key not in INDIFFERENT}
    return found


def add_training_arguments(parser: LightningArgumentParser) -> None:
    """Add the optimizer and its schedule, and let the selection decide which examples are read."""
    parser.link_arguments("model.selection", "data.selection")
    parser.add_optimizer_args((Optimizer,), "optimizer", link_to="model.optimizer")
    parser.add_lr_scheduler_args(LRSchedulerTypeTuple, "lr_scheduler", link_to="model.lr_scheduler")


class KeepFolder(Callback):
    """Ends a fit as soon as its output folder is removed, after which all that it writes would be lost."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def on_train_batch_end(self, trainer: LightningTrainer, pl_module: LightningModule, *_: Any) -> None:
        """Check the folder."""
        self._check()

    def on_fit_end(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Check the folder before the export."""
        self._check()


class FitCLI(VerbCLI):
    """Fine-tune the chosen weights on the chosen examples, measure the result, and export it."""

    verb = "fit"
    result = "delta.safetensors"
    module_class = MaskedFinetuneModule

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the optimizer and its schedule, and let the selection decide which examples are read."""
        super().add_arguments_to_parser(parser)
        add_training_arguments(parser)

    def complete(self, trainer: dict[str, Any]) -> list[Callback]:
        """Have the trainer log, checkpoint and export into the output folder."""
        folder = Path(expanded(self.config.output_dir))
        csv = partial(MetricsLog, name=LOGS, version=0)
        defaults: dict[str, Any] = {"default_root_dir": str(folder / "logs")}
        if not trainer.get("barebones"):
            # all of the validation set at the start: the base model's metrics are part of the report
            defaults |= {"logger": "csv", "num_sanity_val_steps": -1}
        trainer.update({key: value for key, value in defaults.items() if trainer.get(key) is None})
        if trainer.get("logger"):
            trainer["logger"] = make_loggers(trainer["logger"], folder, csv)
        self.report = FitReport()
        own: list[Callback] = [KeepFolder(self._check_held), self.report, ContinueMetrics(), EndOfTraining()]
        own.append(LogRun(yaml.safe_load(self.replay)))
        own.append(ExportModel(str(folder)))
        if trainer.get("enable_checkpointing") is not False:
            given = trainer.get("callbacks") or []
            own += self._checkpoints(folder / "checkpoints", given if isinstance(given, list) else [given])
        return own

    def _checkpoints(self, folder: Path, given: list[Callback]) -> list[Callback]:
        options = self.config.model
        own: list[Callback] = []
        # before the other checkpoint callbacks, whose checkpoints then include its state
        if options.export == "best" and (best := best_checkpoint(folder, given)):
            own.append(best)
        if not any(isinstance(c, ModelCheckpoint) for c in given):
            own.append(ModelCheckpoint(folder))
            often = timedelta(minutes=options.save_minutes)
            own.append(RecentCheckpoint(folder, filename="recent", train_time_interval=often))
        return own

    def _check_held(self) -> None:
        assert self.folder is not None
        self.folder.check_held()

    def run(self) -> None:
        """Fine-tune, from the newest checkpoint if resuming, and print a report; a finished run is left as it is."""
        folder = self.folder
        assert folder is not None
        check_trainer(self.trainer)
        launch_ranks(self.trainer, self.model)
        if on_rank_zero(lambda: folder.complete and self._confirm(folder)):
            tell(f"{folder.path} holds this run, finished: nothing is left to do")
            return
        self._check()
        settings = self.config.as_dict()
        folder.claim({"command": "fit", **decisive(settings)})
        share = self.datamodule.training_padding_share()
        tell(f"training on {len(self.datamodule.train_dataloader()):,} batches an epoch, {share:.1%} of them padding")
        self._fit(folder)
        figures = self.report.figures(self.trainer, self.model)
        on_rank_zero(lambda: write_atomically(folder.path / "metrics.json", json.dumps(figures, indent=2)))
        folder.finish()
        tell(report(figures))
        tell(f"wrote       {folder.path}: model/, delta.safetensors, metrics.json, checkpoints/, logs/")

    def _confirm(self, folder: RunFolder) -> bool:
        """Check by their configurations that the finished run in the folder is this one."""
        try:
            stored = yaml.safe_load((folder.path / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            stored = None
        own, found = yaml.safe_load(self.replay), stored if isinstance(stored, dict) else {}
        outcome, earlier = ({**decisive(of), "trainer": of.get("trainer")} for of in (own, found))
        folder.confirm(outcome, earlier)
        return True

    def _check(self) -> None:
        """Refuse a mistake in the data, the model or the selection before the folder is touched."""
        self.datamodule.setup("fit")
        self.model.configure_model()
        self.model.check_data(self.datamodule)
        tell_of_data(self.datamodule)

    def _fit(self, folder: RunFolder) -> None:
        checkpoint = self._checkpoint(folder.path) if self.config.resume else None
        if checkpoint:
            self.trainer.num_sanity_val_steps = 0  # it validates the base model, and this one is trained
        try:
            on_rank_zero(lambda: write_atomically(folder.path / "config.yaml", self.replay))
            self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=checkpoint, weights_only=True)
        except Exception as error:
            folder.check_held()
            # with nothing to resume, the next try finds the folder free
            if is_rank_zero() and not checkpoint_files(self._checkpoint_folders(folder.path)):
                folder.release()
            if (refusal := refused(error)) is not None:
                raise UserError(refusal) from error
            raise
        finally:
            self.model.compact.detach()  # hooks, which Python's collector does not see, keep all weights in memory

    def _checkpoint(self, folder: Path) -> Path | None:
        """The checkpoint to resume from, if there is one; prints its name."""
        needs_best = self.config.model.export == "best"
        found = on_rank_zero(lambda: newest_whole(self._checkpoint_folders(folder), needs_best))
        tell(f"going on from {found}" if found else f"{folder} holds no checkpoint yet: starting from the base model")
        return found

    def _checkpoint_folders(self, folder: Path) -> set[Path]:
        """The folders that this run can have written checkpoints to."""
        own = [c.dirpath for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        return {folder, *map(Path, own)}
