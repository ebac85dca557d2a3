"""`dualsft select`: score everything, and choose a data subset and a parameter mask."""

from dualsft.commands.lightning_cli import VerbCLI, tell
from dualsft.selection import SelectionModule
from dualsft.selection.summary import summary
from dualsft.trainer import Trainer


class SelectCLI(VerbCLI):
    """Score every example and every weight, choose a subset of each, and write a selection directory."""

    verb = "select"
    module_class = SelectionModule

    def run(self) -> None:
        """Select, and print what was chosen."""
        config = self.config
        assert isinstance(self.trainer, Trainer)
        selection = self.trainer.select(
            self.model,
            self.datamodule,
            config.output_dir,
            resume=config.resume,
            overwrite=config.overwrite,
            seed=int(config.seed_everything),
            config=self.replay,
        )
        tell(summary(selection, self.datamodule.tokenizer))
