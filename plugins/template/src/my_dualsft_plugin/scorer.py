"""What is worth training: the direction u that scores both sides."""

from torch import Tensor

from dualsft import ParameterStatistics, Scorer


class MyScorer(Scorer):
    """First order, as a start: u = (η/n) P ⊙ v.

    Args:
        scale: Multiplies all scores; an option, to show how one is made.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def direction(self, statistics: ParameterStatistics) -> Tensor:
        """The direction u for one parameter, of its shape."""
        s = statistics
        return self.scale * s.step_size / s.num_examples * s.preconditioner * s.validation_gradient
