"""The base of select, fit and validate: LightningCLI with the options of one verb."""

import sys
from abc import ABC, abstractmethod
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from lightning import LightningModule
from lightning import Trainer as LightningTrainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.states import TrainerStatus

from dualsft.commands.messages import explaining_settings, quieten
from dualsft.commands.parsing import (
    add_folder_options,
    check_numbers,
    check_output_dir,
    plain_values,
    prepare,
    replay_of,
)
from dualsft.commands.path_options import expand_paths
from dualsft.commands.progress_bar import PhaseBars, has_own_bar
from dualsft.commands.short_help import short_help, wants_all, wants_help
from dualsft.data.module import InstructionDataModule
from dualsft.data.options import validation_sources
from dualsft.data.sources import paths_of
from dualsft.errors import naming
from dualsft.models.inspection import read_config
from dualsft.models.loading import model_folder
from dualsft.runs.bars import bar
from dualsft.runs.folder import RunFolder
from dualsft.runs.loggers import log_results, make_loggers
from dualsft.sharding.collectives import is_rank_zero, on_rank_zero
from dualsft.storage.paths import expanded
from dualsft.trainer import Trainer

INPUTS = ("model.model_name_or_path", "model.selection", "model.warmup.checkpoint", "data.train", "task_folder")
"""Options that name what a run reads, and may therefore not overwrite."""


class VerbCLI(LightningCLI, ABC):
    """One verb's options parsed from its arguments, and its trainer, module and data module made.

    A subclass's docstring is the description that its help gives.
    """

    verb: ClassVar[str]
    module_class: ClassVar[type[LightningModule]]
    data_class: ClassVar[type[InstructionDataModule]] = InstructionDataModule
    needs_folder: ClassVar[bool] = True
    resumable: ClassVar[bool] = True
    is_one_run: ClassVar[bool] = True  # and not an experiment of many, which keeps their results in a bank
    result: ClassVar[str] = "manifest.json"
    """The file that tells a finished run from an unfinished one without any result."""

    def __init__(self, arguments: Sequence[str]) -> None:
        quieten()
        super().__init__(
            model_class=self.module_class,
            trainer_class=Trainer,
            datamodule_class=self.data_class,
            save_config_callback=None,
            trainer_defaults={"max_epochs": 3, "devices": 1, "log_every_n_steps": 1, "enable_model_summary": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            # `dualsft.cli.main` says what is wrong, without a page of usage
            parser_kwargs={"prog": f"dualsft {self.verb}", "description": type(self).__doc__, "exit_on_error": False},
            args=list(arguments),
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options about the run itself, and link the options that follow from the model's name and the seed."""
        add_folder_options(parser, self.resumable)
        parser.link_arguments("model.model_name_or_path", "data.tokenizer")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments after configurations and names have been prepared."""
        if wants_help(args):
            print(short_help(parser, self.verb))
            sys.exit(0)
        if wants_all(args):
            args = ["--help"]
        self.config = expand_paths(parser.parse_args(prepare(args, self.verb, parser)))
        check_numbers(self.config)
        try:
            parser.validate(self.config, False)  # null too, which the parser lets pass
        except TypeError as error:
            raise ArgumentError(None, str(error)) from error

    def _set_seed(self) -> None:
        with naming("seed_everything"), explaining_settings():  # numpy takes no negative seed
            super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Check that an output folder is given, and keep the YAML that replays the run."""
        self.config = plain_values(self.config)
        if self.needs_folder:
            check_output_dir(self.config)
        self.folder: RunFolder | None = None
        self.replay = replay_of(self.parser, self.config)

    def instantiate_classes(self) -> None:
        """Make the trainer, the module and the data module; libraries' errors here are mistakes in the settings.

        The model and the output folder are looked at after that, so that mistakes in options are told first.
        """
        with explaining_settings():  # loggers, accelerators, strategies: each raises exceptions of its own kind
            super().instantiate_classes()
        if self.trainer.progress_bar_callback is not None:
            self.datamodule.progress = bar
        config = self.config
        read_config(model_folder(config.model.model_name_or_path))  # of which a tokenizer would be the first victim
        if config.output_dir and self.is_one_run:
            read = [*map(config.get, INPUTS), *validation_sources(config.get("data.validation")).values()]
            inputs = [path for given in read for path in paths_of(given)]
            self.folder = RunFolder(
                config.output_dir,
                resume=config.get("resume", False),
                overwrite=config.overwrite,
                inputs=inputs,
                result=self.result,
                resumable=self.resumable,
            )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> LightningTrainer:
        bars = [] if has_own_bar(config) else [PhaseBars()]
        return super()._instantiate_trainer(config, [*callbacks, *self.complete(config), *bars])

    def complete(self, trainer: dict[str, Any]) -> list[Callback]:
        """Complete the trainer's settings, and return the verb's own callbacks.

        Loggers are told of the run by `log`, once it has claimed the folder that they write to.
        """
        folder = self.config.get("output_dir")
        self.loggers = make_loggers(trainer.get("logger"), Path(expanded(folder)) if folder else None)
        trainer.update(enable_checkpointing=False, logger=False)
        return []

    def log(self, metrics: Mapping[str, float]) -> None:
        """Log the settings and what a run has found, where a logger was asked for."""
        settings = yaml.safe_load(self.replay)
        folder = self.folder.path if self.folder else None
        on_rank_zero(lambda: log_results(self.loggers, folder, settings, metrics))

    @classmethod
    def command(cls, arguments: Sequence[str]) -> None:
        """Parse the arguments after the verb, and run it; errors are those of `dualsft.cli.run`."""
        job = cls(arguments)
        try:
            job.run()
        except SystemExit as stop:  # Lightning's silent answer to Ctrl-C
            if job.trainer.state.status == TrainerStatus.INTERRUPTED:
                raise KeyboardInterrupt from stop
            raise

    @abstractmethod
    def run(self) -> None:
        """Run the verb; the trainer, the module and the data module have been made."""


def tell(text: str) -> None:
    """Print a text once for all ranks."""
    if is_rank_zero():
        print(text)
