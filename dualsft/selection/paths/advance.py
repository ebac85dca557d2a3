"""The training that the walk of a path advances. Its first step sets it up, so a walk that only loads does without."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from dualsft.errors import UserError
from dualsft.models import PreTrainedModel
from dualsft.selection.dense_training import DenseTraining
from dualsft.sharding.load import copy_weights
from dualsft.sharding.shards import local_shard


class PathAdvance:
    """A `dualsft.paths.PathTraining` over the steps of a `DenseTraining`; those that an earlier run took are skipped.

    Args:
        model: The model.
        epochs: Passes over what it trains on.
        steps: The optimizer steps of all epochs.
        stretches: The steps of each piece.
        start: Sets up the training, from the weights of the moment.
        take: Takes its steps, see `DenseTraining.steps`.
        taken: How many an earlier run took.

    Attributes:
        goal: How many steps the walk has asked for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        epochs: int,
        steps: int,
        stretches: Sequence[int],
        start: Callable[[], DenseTraining],
        take: Callable[[DenseTraining], Iterator[int]],
        taken: int,
    ) -> None:
        self._model = model
        self.model: nn.Module = model
        self.epochs, self.steps, self.stretches, self.goal = epochs, steps, stretches, 0
        self._start, self._take, self._taken = start, take, taken
        self._training: DenseTraining | None = None
        self._iterator: Iterator[int] = iter(())
        self._left: list[int] = []

    def train(self, steps: int) -> None:
        """Take so many optimizer steps.

        Raises:
            UserError: if there are not so many, or the weights were moved after earlier steps.
        """
        if not isinstance(steps, int) or steps < 0:
            raise UserError(
                f"The path's walk trains for {steps!r} steps; mend it to give a whole number of at least 0."
            )
        if self._left and self._left != self._versions():
            raise UserError(
                "The path's walk moves the weights between steps of the training, which keeps its own copy of them; "
                "mend it to move them before the first step, or after the last."
            )
        self.goal += steps
        while self._taken < self.goal:
            if self._training is None:
                self._training = self._start()
                self._iterator = self._take(self._training)
            taken = next(self._iterator, None)
            if taken is None:
                raise UserError(
                    f"The path asks for step {self.goal}, but model.path.epochs gives {self._taken}; raise it."
                )
            self._taken = taken
        self._left = self._versions() if self._training else []

    def load(self, checkpoint: str) -> None:
        """Copy the weights of a checkpoint into the model.

        Raises:
            UserError: if it cannot be read, or has other weights than the model.
        """
        copy_weights(self._model, checkpoint)

    def second_moment(self) -> Mapping[str, Tensor]:
        """ĉ after the latest step, see `DenseTraining.second_moment`; nothing where an earlier run took that step."""
        return self._training.second_moment() if self._training else {}

    def close(self) -> None:
        """Remove the training's hooks from the model, if there are any."""
        if self._training:
            self._training.close()

    def _versions(self) -> list[int]:
        """A number for each parameter that grows whenever it is modified."""
        return [local_shard(parameter.detach())._version for parameter in self._model.parameters()]
