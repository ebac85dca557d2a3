"""The layout of a part of a batch's tokens, when modules are called with these alone."""

from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from dualsft.data.layout import Layout


class PartialLayout(Layout):
    """Some tokens of a batch, each of which is a row of its own: outputs have the shape (token, 1, ...).

    Args:
        batch: The layout of the batch.
        places: The tokens' numbers in it, counted row by row, ascending.
    """

    def __init__(self, batch: Layout, places: Int[Tensor, " token"]) -> None:
        super().__init__(len(places), 1, [(k, 0, 1) for k in range(len(places))])
        self.batch, self.places = batch, places

    @cached_property
    def in_examples(self) -> tuple[Layout, list[int]]:
        """The same tokens as one packed row, and the numbers in the batch of the examples there; waits for the device.

        An example's tokens lie side by side here too, as it is a span of a row.
        """
        spans = [(row * self.batch.tokens + first, length) for row, first, length in self.batch.spans]
        ends = torch.tensor([(start, start + length) for start, length in spans], dtype=torch.int64)
        found = torch.searchsorted(self.places.cpu(), ends.view(-1, 2)).tolist()
        present = {k: (0, first, end - first) for k, (first, end) in enumerate(found) if end > first}
        return Layout(1, len(self.places), [*present.values()]), [*present]
