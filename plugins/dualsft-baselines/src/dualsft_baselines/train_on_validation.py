"""|l_i(θ_0) − l_i(θ_K)|, with θ_K the model after training on the validation set: which losses that moves most.

Source: Jain, Montanari, Sasoglu, "Train on Validation (ToV): Fast data selection with applications to fine-tuning",
arXiv 2510.00386 (ICLR 2026). By its abstract it does inference on the pool before and after a fine-tune on the
validation set, and selects the samples whose predictions change the most.

What is ours, and was not compared with the paper's code: an example's prediction is its mean loss per supervised token,
and the change is taken of that mean and not token by token. Random examples are not mixed in. By dualsft's default the
first model is the warm-up's, a quarter of the validation set is held out, and a training that does not lower its loss
is refused; `model.warmup.fraction` 0 starts at the base model, and `model.path.held_out` 0 trains on all of the set.
"""

from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from dualsft import PathTraining, PieceRows, ScoringPath, UserError

_BY = ("change", "fall")


class TrainOnValidation(ScoringPath):
    """How far training on the validation set moves each example's loss (Train on Validation, arXiv 2510.00386).

    It takes two passes over the pool without gradients. Weights are scored by what moving them along the path does to
    the validation set, as along the path target.

    Args:
        by: change, the size of the move either way, or fall, so that an example whose loss rises is worth least.
    """

    trains_on = "target"

    def __init__(self, by: Literal["change", "fall"] = "change") -> None:
        if by not in _BY:
            raise UserError(f"train_on_validation scores by the 'change' or the 'fall', not {by!r}.")
        self.by = by

    def walk(self, training: PathTraining) -> Iterator[None]:
        """One piece, whatever the number of pieces: before the training, and after."""
        yield
        training.train(training.steps)
        yield

    def contribution(self, rows: PieceRows) -> Tensor:
        """The fall of each loss, or its size."""
        return rows.score.abs() if self.by == "change" else rows.score
