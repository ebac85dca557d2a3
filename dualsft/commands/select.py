"""`dualsft select`: score everything, and choose a data subset and a parameter mask."""

from dualsft.commands.lightning_cli import VerbCLI, tell
from dualsft.selection.logged import logged
from dualsft.selection.module import SelectionModule
from dualsft.selection.summary import summary
from dualsft.sharding.collectives import on_rank_zero
from dualsft.trainer import Trainer


class SelectCLI(VerbCLI):
    """Score every example and every weight, choose a subset of each, and write a selection directory."""

    verb = "select"
    module_class = SelectionModule

    def run(self) -> None:
        """Select, and print what was chosen."""
        seed = int(self.config.seed_everything)
        assert isinstance(self.trainer, Trainer)
        assert self.folder is not None
        folder = self.folder
        is_finished = on_rank_zero(lambda: folder.complete)
        selection = self.trainer.select(self.model, self.datamodule, self.folder, seed=seed, config=self.replay)
        if not is_finished:
            self.log(logged(selection.about))
        tell(summary(selection, self.datamodule.tokenizer, self.datamodule.train_examples.records))
