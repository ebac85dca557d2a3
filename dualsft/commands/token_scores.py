"""Scores by token for a report: the selection's own configuration, run again for the examples that are shown."""

import tempfile
from collections.abc import Sequence

from dualsft.commands.select import SelectCLI
from dualsft.selection import Selection
from dualsft.selection.example_tokens import TokenScores
from dualsft.trainer import Trainer


class TokenScoresCLI(SelectCLI):
    """Score the tokens of a few examples."""

    def score(self, ids: Sequence[int]) -> TokenScores:
        """Score the tokens of these examples."""
        assert isinstance(self.trainer, Trainer)
        assert self.folder is not None
        seed = int(self.config.seed_everything)
        return self.trainer.score_tokens(self.model, self.datamodule, self.folder, ids, seed)


def computed_tokens(selection: Selection, ids: Sequence[int]) -> TokenScores:
    """Load the model, reach the selection's scoring checkpoint once more, and score the tokens of some examples.

    Raises:
        UserError: if the selection's inputs are not where they were, or its scores cannot be told by token.
        ArgumentError: if its configuration is not that of `select`.
    """
    config = str(selection.folder / "config.yaml")
    with tempfile.TemporaryDirectory(prefix="dualsft-") as folder:
        given = ["--config", config, "--output_dir", f"{folder}/tokens", "--model.warmup.keep", "false"]
        return TokenScoresCLI(given).score(ids)
