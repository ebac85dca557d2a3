"""What select, fit and validate share: LightningCLI with the options of one verb."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from jsonargparse import ActionYesNo, ArgumentError, Namespace
from lightning import LightningModule
from lightning import Trainer as LightningTrainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.states import TrainerStatus

from dualsft.commands.messages import quieten, unusable
from dualsft.commands.parsing import plain_values, prepare
from dualsft.data import InstructionDataModule, validation_sources
from dualsft.errors import UserError
from dualsft.models.loading import model_folder
from dualsft.runs.folder import RunFolder
from dualsft.sharding.collectives import is_rank_zero
from dualsft.trainer import Trainer

INPUTS = ("model.model_name_or_path", "model.selection", "model.warmup.checkpoint", "data.train", "task_folder")
"""Options that name what a run reads, and may therefore not overwrite."""


class VerbCLI(LightningCLI, ABC):
    """One verb's options parsed, and its trainer, module and data module made.

    A subclass's docstring is the description that its help gives.

    Args:
        arguments: As typed after the verb.
    """

    verb: ClassVar[str]
    module_class: ClassVar[type[LightningModule]]
    needs_folder: ClassVar[bool] = True

    def __init__(self, arguments: Sequence[str]) -> None:
        quieten()
        super().__init__(
            model_class=self.module_class,
            trainer_class=Trainer,
            datamodule_class=InstructionDataModule,
            save_config_callback=None,
            trainer_defaults={"max_epochs": 3, "devices": 1, "log_every_n_steps": 1, "enable_model_summary": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            # `dualsft.cli.main` says what is wrong, without a page of usage
            parser_kwargs={
                "prog": f"dualsft {self.verb}",
                "description": inspect.getdoc(type(self)),
                "exit_on_error": False,
            },
            args=list(arguments),
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options about the run itself, and let the model's name and the seed decide what follows from them."""
        parser.add_argument("--output_dir", type=str, default="", help="Folder that the results are written to.")
        parser.add_argument(
            "--resume", action=ActionYesNo, default=False, help="Go on from what a killed run left in --output_dir."
        )
        parser.add_argument(
            "--overwrite", action=ActionYesNo, default=False, help="Replace the run that --output_dir holds."
        )
        parser.link_arguments("model.model_name_or_path", "data.tokenizer")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments after configurations and names have been prepared."""
        self.config = parser.parse_args(prepare(args, self.verb, parser))

    def before_instantiate_classes(self) -> None:
        """Check the output folder before anything is loaded."""
        config = self.config = plain_values(self.config)
        if not config.output_dir and self.needs_folder:
            raise UserError("--output_dir is not given; name the folder that the results are to be written to.")
        model_folder(config.model.model_name_or_path)
        self.folder: RunFolder | None = None
        if config.output_dir:
            inputs = [*map(config.get, INPUTS), *validation_sources(config.get("data.validation")).values()]
            how = {"resume": config.resume, "overwrite": config.overwrite}
            self.folder = RunFolder(config.output_dir, **how, inputs=inputs)
        once = {"resume": False, "overwrite": False}
        self.replay = self.parser.dump(Namespace(**{**vars(config), **once}), skip_none=False)

    def instantiate_classes(self) -> None:
        """Make the trainer, the module and the data module; what a library refuses there, the user gave it."""
        try:
            super().instantiate_classes()
        except (UserError, ArgumentError):
            raise
        except Exception as error:  # loggers, accelerators, strategies: each refuses in a way of its own
            raise UserError(unusable(error)) from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> LightningTrainer:
        return super()._instantiate_trainer(config, [*callbacks, *self.complete(config)])

    def complete(self, trainer: dict[str, Any]) -> list[Callback]:
        """Complete the trainer's settings, and return the verb's own callbacks."""
        trainer.update(enable_checkpointing=False, logger=trainer.get("logger") or False)
        return []

    @classmethod
    def command(cls, arguments: Sequence[str]) -> None:
        """Parse the arguments after the verb, and run it.

        Raises:
            UserError: on a mistake in the input or the settings.
            ArgumentError: on options that cannot be parsed.
            KeyboardInterrupt: on Ctrl-C.
        """
        job = cls(arguments)
        try:
            job.run()
        except SystemExit as stop:  # Lightning's silent answer to Ctrl-C
            if job.trainer.state.status == TrainerStatus.INTERRUPTED:
                raise KeyboardInterrupt from stop
            raise

    @abstractmethod
    def run(self) -> None:
        """Do what the verb is for, with the trainer, the module and the data module."""


def tell(text: str) -> None:
    """Print a text once for all ranks."""
    if is_rank_zero():
        print(text)
