"""`dualsft validate`: evaluate a checkpoint on data, on tasks, or on both."""

import json
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from dualsft.commands.lightning_cli import VerbCLI, tell
from dualsft.evaluation import EvaluationModule, TaskOptions, load_tasks, task_metrics, task_report
from dualsft.evaluation.predictions import FILE, as_lines, cut_short
from dualsft.runs.progress import say
from dualsft.selection.overlap import tell_of_data
from dualsft.sharding.collectives import on_rank_zero
from dualsft.storage.writing import write_atomically
from dualsft.trainer import Trainer


class ValidateCLI(VerbCLI):
    """Evaluate a checkpoint on validation sets, on tasks of the lm-evaluation-harness, or on both."""

    verb = "validate"
    module_class = EvaluationModule
    needs_folder = False  # the metrics may only be printed
    resumable = False

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the option of `Trainer.validate`, and those of the tasks."""
        super().add_arguments_to_parser(parser)
        given = {"model", "dataloaders", "datamodule", "ckpt_path", "weights_only"}
        parser.add_method_arguments(Trainer, "validate", skip=given)
        parser.add_class_arguments(TaskOptions)

    def run(self) -> None:
        """Evaluate; the tasks are loaded first, so that a mistake in them shows at once."""
        config, model, data = self.config, self.model, self.datamodule
        options = TaskOptions(**{field.name: config[field.name] for field in fields(TaskOptions)})
        tasks = load_tasks(self.trainer, options)
        if tasks and data.validation is None:
            model.configure_model()
        else:
            self._validate_data()
        results = None
        if tasks:
            seed = int(config.seed_everything)
            results = model.evaluate_tasks(self.trainer, tasks, options, data.batch_size, seed)
            if config.verbose:
                tell(task_report(results))
        for remark in cut_short(model.predictions, model.generation.max_new_tokens):
            say(remark)
        if self.folder is not None:
            self.folder.claim({"command": "validate"})
            try:
                on_rank_zero(partial(self._write_metrics, self.folder.path, results))
            except BaseException:
                self.folder.release()
                raise
            self.folder.finish()
        self.log({name: float(value) for name, value in self.trainer.callback_metrics.items()})

    def _validate_data(self) -> None:
        """List the metrics of named sets ourselves; Lightning's table would repeat all of them for each set."""
        named, verbose = self.datamodule.named_validation, self.config.verbose
        self.trainer.validate(self.model, datamodule=self.datamodule, verbose=verbose and not named)
        tell_of_data(self.datamodule)
        if verbose and named:
            width = max(map(len, self.trainer.callback_metrics), default=0)
            for name, value in self.trainer.callback_metrics.items():
                tell(f"{name:<{width}}  {float(value):.6g}")

    def _write_metrics(self, folder: Path, results: dict[str, Any] | None) -> None:
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        write_atomically(folder / "config.yaml", self.replay)
        if results is not None:
            metrics |= task_metrics(results)
            write_atomically(folder / "tasks.json", json.dumps(results, indent=2))
        if predictions := self.model.predictions:
            write_atomically(folder / FILE, as_lines(predictions))
        write_atomically(folder / "metrics.json", json.dumps(metrics, indent=2))
