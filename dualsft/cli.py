"""The command line: LightningCLI with select, fit and validate, and four small commands beside it.

dualsft select      score, and choose a data subset and a parameter mask
dualsft fit         fine-tune what was chosen
dualsft validate    evaluate a checkpoint
dualsft allocate    choose anew from the scores of a selection
dualsft export      apply, revert and extract deltas
dualsft plugins     what is registered
dualsft quickstart  the whole job on an embedded model and embedded data
"""

import json
import logging
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from jsonargparse import ActionYesNo, ArgumentParser, Namespace, capture_parser
from lightning import Trainer as LightningTrainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, LRSchedulerTypeTuple
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerStatus
from torch.optim import Optimizer
from transformers.utils import logging as transformers_logging

from dualsft.commands.messages import plainly, refused, unusable
from dualsft.commands.parsing import plain_values, prepare
from dualsft.data import InstructionDataModule, validation_sources
from dualsft.errors import UserError, is_lost_contact, is_out_of_memory, shortage
from dualsft.evaluation import EvaluationModule, TaskOptions, load_tasks, task_metrics, task_report
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
from dualsft.models.loading import check_vocabulary, model_folder
from dualsft.runs.folder import RunFolder, write_atomically
from dualsft.selection import SelectionModule
from dualsft.selection.summary import summary
from dualsft.sharding.collectives import is_rank_zero, on_rank_zero, rank
from dualsft.sharding.strategy import launch_ranks
from dualsft.trainer import Trainer, latest_checkpoint

MODULES = {"select": SelectionModule, "fit": MaskedFinetuneModule, "validate": EvaluationModule}
DESCRIPTION = (
    "Choose what to train on and what to train. Four commands stand beside the subcommands below: 'dualsft "
    "quickstart' runs the whole job on an embedded model and data, 'dualsft allocate' spends other budgets on the "
    "scores of a finished selection, 'dualsft export' applies, reverts and extracts deltas, 'dualsft plugins' lists "
    "the registered scorers and allocators."
)
CHECKPOINTS = "checkpoints"
# imported when called: they need no trainer, or this very module
SIMPLE_COMMANDS = {
    "allocate": "dualsft.commands.allocate:allocate_command",
    "export": "dualsft.commands.export:export_command",
    "plugins": "dualsft.commands.plugins:plugins_command",
    "quickstart": "dualsft.commands.quickstart:quickstart_command",
}


class DualSFTCLI(LightningCLI):
    """One module per verb, one data module, one trainer."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs, and which of the trainer methods' arguments are not options."""
        select = {"model", "datamodule", "output_dir", "resume", "overwrite", "seed", "config"}
        fit = {"model", "train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path", "weights_only"}
        return {
            "select": select,
            "fit": fit,
            "validate": {"model", "dataloaders", "datamodule", "ckpt_path", "weights_only"},
        }

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        # LightningCLI has one model class for all verbs; each of ours has its own, known as its parser is built
        self._model_class = MODULES[subcommand]
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        _link(parser, subcommand)
        return parser

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that leaves it to `main` to say what is wrong, without a page of usage."""
        return super().init_parser(**{"exit_on_error": False, **kwargs})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options that are about the run as a whole."""
        parser.add_argument("--output_dir", type=str, default="", help="Folder that the results are written to.")
        parser.add_argument(
            "--resume", action=ActionYesNo, default=False, help="Go on from what a killed run left in --output_dir."
        )
        parser.add_argument(
            "--overwrite", action=ActionYesNo, default=False, help="Replace the run that --output_dir holds."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line after configurations and names have been prepared."""
        self.config = parser.parse_args(prepare(sys.argv[1:] if args is None else args, self._subcommand_parsers))

    def before_instantiate_classes(self) -> None:
        """Look at the output folder before anything is loaded."""
        config = self.config[self.subcommand] = plain_values(self.config[self.subcommand])
        if not config.output_dir and self.subcommand != "validate":
            raise UserError("--output_dir is not given; name the folder that the results are to be written to.")
        model_folder(config.model.model_name_or_path)
        self.folder: RunFolder | None = None  # validate may only print its figures
        if config.output_dir:
            keys = (
                "model.model_name_or_path",
                "model.selection",
                "model.warmup.checkpoint",
                "data.train",
                "task_folder",
            )
            inputs = [*map(config.get, keys), *validation_sources(config.get("data.validation")).values()]
            how = {"resume": config.resume, "overwrite": config.overwrite}
            self.folder = RunFolder(config.output_dir, **how, inputs=inputs)
        once = {"resume": False, "overwrite": False}
        self.replay = self._parser(self.subcommand).dump(Namespace(**{**vars(config), **once}), skip_none=False)

    def instantiate_classes(self) -> None:
        """Make the trainer, the module and the data module; what a library refuses, the user gave it."""
        try:
            super().instantiate_classes()
        except (UserError, ArgumentError):
            raise
        except Exception as error:  # loggers, accelerators, strategies: each refuses in a way of its own
            raise UserError(unusable(error)) from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> LightningTrainer:
        if self.subcommand == "fit" and self.folder is not None:
            callbacks = [*callbacks, *self._fit_callbacks(self.folder, config)]
            if config.get("logger") is None and not config.get("barebones"):
                config["logger"] = CSVLogger(self.folder.path, name="logs")
            if config.get("default_root_dir") is None:
                config["default_root_dir"] = str(self.folder.path / "logs")
            if config.get("num_sanity_val_steps") is None and not config.get("barebones"):
                config["num_sanity_val_steps"] = -1  # all of it: what the base model gives is part of the report
        else:
            config.update(enable_checkpointing=False, logger=config.get("logger") or False)
        return super()._instantiate_trainer(config, callbacks)

    def _fit_callbacks(self, folder: RunFolder, config: dict[str, Any]) -> list[Callback]:
        self.report = FitReport()
        own: list[Callback] = [self.report, EndOfTraining(), ExportModel(str(folder.path))]
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        if config.get("enable_checkpointing") is False:
            return own
        options = self.config["fit"].model
        # before the others, whose checkpoints then know of it
        if options.export == "best" and (best := best_checkpoint(folder.path / CHECKPOINTS, given)):
            own.append(best)
        if not any(isinstance(c, ModelCheckpoint) for c in given):
            own.append(ModelCheckpoint(folder.path / CHECKPOINTS))
            often = timedelta(minutes=options.save_minutes)
            own.append(RecentCheckpoint(folder.path / CHECKPOINTS, filename="recent", train_time_interval=often))
        return own

    def select(self, model: SelectionModule, datamodule: InstructionDataModule) -> None:
        """Run the selection and say what was chosen."""
        config = self.config["select"]
        assert isinstance(self.trainer, Trainer)
        selection = self.trainer.select(
            model,
            datamodule,
            config.output_dir,
            resume=config.resume,
            overwrite=config.overwrite,
            seed=int(config.seed_everything),
            config=self.replay,
        )
        if is_rank_zero():
            print(summary(selection, datamodule.tokenizer))

    def fit(self, model: MaskedFinetuneModule, datamodule: InstructionDataModule, **kwargs: Any) -> None:
        """Fine-tune, from the newest checkpoint if resuming."""
        folder = self.folder
        assert folder is not None
        # a mistake in the trainer, the data, the model or the selection shows here, before the folder is touched
        check_trainer(self.trainer)
        launch_ranks(self.trainer, model)
        datamodule.setup("fit")
        model.configure_model()
        for examples in (datamodule.train_examples, *datamodule.validation_sets.values()):
            check_vocabulary(model.model, examples.largest_id())
        settings = self.config["fit"].as_dict()
        decisive = ("seed_everything", "model", "data", "optimizer", "lr_scheduler")
        folder.claim({"command": "fit", **{key: settings.get(key) for key in decisive}})
        on_rank_zero(lambda: write_atomically(folder.path / "config.yaml", self.replay))
        share = datamodule.training_padding_share()
        tell(f"training on {len(datamodule.train_dataloader()):,} batches an epoch, {share:.1%} of them padding")
        checkpoint = self._checkpoint(folder.path) if self.config["fit"].resume else None
        if checkpoint:
            self.trainer.num_sanity_val_steps = 0  # the base model has been validated, and this is none
        try:
            self.trainer.fit(model, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True, **kwargs)
        except Exception as error:
            if self._latest(folder.path) is None:  # nothing to resume: the next try finds the folder free
                folder.release()
            if (refusal := refused(error)) is not None:
                raise UserError(refusal) from error
            raise
        figures = self.report.figures(self.trainer, model)
        on_rank_zero(lambda: write_atomically(folder.path / "metrics.json", json.dumps(figures, indent=2)))
        folder.finish()
        tell(report(figures))
        tell(f"wrote       {folder.path}: model/, delta.safetensors, metrics.json, checkpoints/, logs/")

    def _checkpoint(self, folder: Path) -> Path | None:
        """Where to go on from, and a word on it."""
        found = on_rank_zero(lambda: self._latest(folder))
        tell(f"going on from {found}" if found else f"{folder} holds no checkpoint yet: starting from the base model")
        return found

    def _latest(self, folder: Path) -> Path | None:
        """The newest checkpoint that this run can have written."""
        own = [c.dirpath for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        return latest_checkpoint({folder, *map(Path, own)})

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as stop:  # so does Lightning answer Ctrl-C, in silence
            if self.trainer.state.status == TrainerStatus.INTERRUPTED:
                raise KeyboardInterrupt from stop
            raise

    def validate(
        self, model: EvaluationModule, datamodule: InstructionDataModule, verbose: bool = True, **kwargs: Any
    ) -> None:
        """Evaluate on data, on tasks, or on both; what tasks need is looked at first."""
        config = self.config["validate"]
        options = TaskOptions(**{field.name: config[field.name] for field in fields(TaskOptions)})
        tasks = load_tasks(self.trainer, options)
        if tasks and datamodule.validation is None:
            model.configure_model()
        else:
            self._validate_data(model, datamodule, verbose, **kwargs)
        seed = int(config.seed_everything)
        self.task_results = (
            model.evaluate_tasks(self.trainer, tasks, options, datamodule.batch_size, seed) if tasks else None
        )
        if verbose and self.task_results is not None:
            tell(task_report(self.task_results))

    def _validate_data(
        self, model: EvaluationModule, datamodule: InstructionDataModule, verbose: bool, **kwargs: Any
    ) -> None:
        """List the metrics of named sets ourselves; Lightning's table would repeat all of them for each set."""
        named = datamodule.named_validation
        self.trainer.validate(model, datamodule=datamodule, verbose=verbose and not named, **kwargs)
        if verbose and named:
            width = max(map(len, self.trainer.callback_metrics), default=0)
            for name, value in self.trainer.callback_metrics.items():
                tell(f"{name:<{width}}  {float(value):.6g}")

    def after_validate(self) -> None:
        """Keep the metrics, if there is a folder to keep them in."""
        if self.folder is not None:
            self.folder.claim({"command": "validate"})
            on_rank_zero(partial(self._write_metrics, self.folder.path))
            self.folder.finish()

    def _write_metrics(self, folder: Path) -> None:
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        write_atomically(folder / "config.yaml", self.replay)
        if self.task_results is not None:
            metrics |= task_metrics(self.task_results)
            write_atomically(folder / "tasks.json", json.dumps(self.task_results, indent=2))
        write_atomically(folder / "metrics.json", json.dumps(metrics, indent=2))


def tell(text: str) -> None:
    """Print something, once for all ranks."""
    if is_rank_zero():
        print(text)


def _link(parser: LightningArgumentParser, subcommand: str) -> None:
    """Give a setting that two parts share one place in the configuration."""
    parser.link_arguments("model.model_name_or_path", "data.tokenizer")
    parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
    if subcommand == "validate":
        parser.add_class_arguments(TaskOptions)
    if subcommand == "fit":
        parser.link_arguments("model.selection", "data.selection")
        parser.add_optimizer_args((Optimizer,), "optimizer", link_to="model.optimizer")
        parser.add_lr_scheduler_args(LRSchedulerTypeTuple, "lr_scheduler", link_to="model.lr_scheduler")
        LightningCLI.link_optimizers_and_lr_schedulers(parser)


def run(arguments: Sequence[str]) -> None:
    """Run one command.

    Raises:
        UserError: on a mistake in the input or the settings.
        SystemExit: after printing help, or on options that cannot be parsed (code 2).
    """
    if arguments and arguments[0] in SIMPLE_COMMANDS:
        resolve_name(SIMPLE_COMMANDS[arguments[0]])(arguments[1:])
        return
    if arguments and not arguments[0].startswith("-") and arguments[0] not in MODULES:
        known = ", ".join([*MODULES, *SIMPLE_COMMANDS])
        raise UserError(f"dualsft has no command {arguments[0]!r}; its commands are {known}.")
    quieten()
    DualSFTCLI(
        model_class=SelectionModule,
        trainer_class=Trainer,
        datamodule_class=InstructionDataModule,
        save_config_callback=None,
        trainer_defaults={"max_epochs": 3, "devices": 1, "log_every_n_steps": 1, "enable_model_summary": False},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={"description": DESCRIPTION, "prog": "dualsft"},
        args=list(arguments),
    )


def verb_parsers() -> dict[str, ArgumentParser]:
    """Verb -> the parser of its options; nothing is parsed or run."""
    subcommands = capture_parser(run, [])._subcommands_action
    assert subcommands is not None
    return dict(subcommands.choices)


def quieten() -> None:
    """Leave out what tells a user of this program nothing: other libraries' tips and their own deprecations."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's calls, not ours
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # which copies the masters alone
    warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback with a model that overrides")


def main() -> None:
    """The console script: a user's mistake ends in one sentence, with exit code 1, or 2 for options."""
    try:
        run(sys.argv[1:])
    except (UserError, MisconfigurationException) as error:
        _fail(str(error), 1)
    except ArgumentError as error:
        _fail(plainly(error), 2)
    except (RuntimeError, MemoryError) as error:
        if is_lost_contact(error):
            _fail(
                "another process of this job has stopped or cannot be reached, and says itself why if it could; the "
                "same command with --resume goes on from what has been kept.",
                1,
            )
        if not is_out_of_memory(error):
            raise
        _fail(f"memory ran out ({shortage(error)}); lower data.batch_tokens, or set model.dtype to bfloat16.", 1)
    except KeyboardInterrupt:
        _fail("interrupted; the same command with --resume goes on from what is finished.", 130)


def _fail(message: str, code: int) -> None:
    place = "" if is_rank_zero() else f" (rank {rank()})"
    print(f"dualsft: error{place}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
