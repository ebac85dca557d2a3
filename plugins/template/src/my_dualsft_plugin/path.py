"""Where the model goes while the pool is scored, in place of one scoring checkpoint."""

from collections.abc import Iterator

from dualsft import PathTraining, ScoringPath


class MyPath(ScoringPath):
    """Training on the validation set in pieces, as a start: examples score by how far it lowers their losses."""

    trains_on = "target"

    def walk(self, training: PathTraining) -> Iterator[None]:
        """Move the model along the path, and yield at each point, the first included."""
        yield
        for steps in training.stretches:
            training.train(steps)
            yield
