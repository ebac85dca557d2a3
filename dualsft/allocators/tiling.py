"""A tensor cut into equal tiles of its matrices: rows, columns or blocks, numbered row by row, matrix after matrix.

The last two axes are the matrix; axes before them make a batch of matrices. A vector is a matrix with one column.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Tiling:
    """How a tensor is cut; the tiles of the last row and of the last column may be smaller.

    Attributes:
        shape: Of the tensor as a batch of matrices.
        tile: Height and width of a tile.
    """

    shape: tuple[int, int, int]
    tile: tuple[int, int]

    @classmethod
    def of(cls, shape: Sequence[int], height: int | None, width: int | None) -> "Tiling":
        """Tiles of at most this height and width; None for those of the matrix."""
        *batch, rows, columns = shape if len(shape) > 1 else (*shape, *[1] * (2 - len(shape)))
        # at least one by one: an empty matrix has no tiles, whatever their size
        tile = (max(1, min(height or rows, rows)), max(1, min(width or columns, columns)))
        return cls((prod(batch), rows, columns), tile)

    @property
    def grid(self) -> tuple[int, int]:
        """How many tiles there are down and across a matrix."""
        _, rows, columns = self.shape
        return -(-rows // self.tile[0]), -(-columns // self.tile[1])

    @property
    def count(self) -> int:
        """How many tiles there are."""
        return self.shape[0] * prod(self.grid)

    def sums(self, values: Float[Tensor, "..."]) -> Float[Tensor, " unit"]:
        """Each tile's sum, added in float64."""
        (down, across), (height, width) = self.grid, self.tile
        matrices, (batch, rows, columns) = values.reshape(self.shape), self.shape
        padding = (0, across * width - columns, 0, down * height - rows)
        padded = pad(matrices, padding) if any(padding) else matrices
        return padded.reshape(batch, down, height, across, width).sum((2, 4), dtype=torch.float64).flatten()

    def sizes(self) -> Int[Tensor, " unit"]:
        """How many entries each tile has."""
        heights, widths = (
            torch.arange(0, length, step).neg().add(length).clamp(max=step)
            for length, step in zip(self.shape[1:], self.tile, strict=True)
        )
        return torch.outer(heights, widths).expand(self.shape[0], -1, -1).flatten()

    def entries(self, units: Bool[Tensor, " unit"]) -> Bool[Tensor, " entry"]:
        """Which entries of the tensor, flat, are in these tiles."""
        (down, across), (height, width) = self.grid, self.tile
        batch, rows, columns = self.shape
        whole = units.view(batch, down, 1, across, 1).expand(-1, -1, height, -1, width)
        return whole.reshape(batch, down * height, across * width)[:, :rows, :columns].flatten().contiguous()

    def slices(self, unit: int) -> tuple[int, slice, slice]:
        """Where a tile lies in the batch of matrices."""
        (down, across), (height, width) = self.grid, self.tile
        place, column = divmod(unit, across)
        matrix, row = divmod(place, down)
        return matrix, slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)
