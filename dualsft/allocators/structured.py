"""Whole rows, columns or blocks of matrices, by their summed score: Σ_{j in unit} φ_j, or Σ |φ_j|.

Units of all tensors go into one ranking. They are taken from its top for as long as all of a unit fits, and of the
first that does not fit, the best entries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from dualsft.allocators.base import ParameterAllocator
from dualsft.allocators.choice import By, Choice, check_by, ranked
from dualsft.errors import UserError

Unit = Literal["row", "column", "block"]
_BLOCK_SIZE = 64


@dataclass(frozen=True)
class Tiling:
    """A tensor cut into equal tiles of its matrices, numbered row by row, matrix after matrix.

    The tiles of the last row and of the last column may be smaller.

    Attributes:
        shape: The tensor's shape as a batch of matrices.
        tile: Height and width of a tile.
    """

    shape: tuple[int, int, int]
    tile: tuple[int, int]

    @classmethod
    def of(cls, shape: Sequence[int], height: int | None, width: int | None) -> "Tiling":
        """Tiles of at most this height and width; None means the matrix's own."""
        *batch, rows, columns = shape if len(shape) > 1 else (*shape, *[1] * (2 - len(shape)))
        # at least one by one: an empty matrix has no tiles, whatever their size
        tile = (max(1, min(height or rows, rows)), max(1, min(width or columns, columns)))
        return cls((prod(batch), rows, columns), tile)

    @property
    def grid(self) -> tuple[int, int]:
        """The number of tiles down and across a matrix."""
        _, rows, columns = self.shape
        return -(-rows // self.tile[0]), -(-columns // self.tile[1])

    @property
    def count(self) -> int:
        """The number of tiles."""
        return self.shape[0] * prod(self.grid)

    def sums(self, values: Float[Tensor, "..."]) -> Float[Tensor, " unit"]:
        """The sum of each tile's entries, in float64."""
        (down, across), (height, width) = self.grid, self.tile
        matrices, (batch, rows, columns) = values.reshape(self.shape), self.shape
        padding = (0, across * width - columns, 0, down * height - rows)
        padded = pad(matrices, padding) if any(padding) else matrices
        return padded.reshape(batch, down, height, across, width).sum((2, 4), dtype=torch.float64).flatten()

    def sizes(self) -> Int[Tensor, " unit"]:
        """The number of entries of each tile."""
        heights, widths = (
            torch.arange(0, length, step).neg().add(length).clamp(max=step)
            for length, step in zip(self.shape[1:], self.tile, strict=True)
        )
        return torch.outer(heights, widths).expand(self.shape[0], -1, -1).flatten()

    def entries(self, units: Bool[Tensor, " unit"]) -> Bool[Tensor, " entry"]:
        """Which entries of the tensor, flat, are in these tiles."""
        (down, across), (height, width) = self.grid, self.tile
        batch, rows, columns = self.shape
        padded = units.view(batch, down, 1, across, 1).expand(-1, -1, height, -1, width)
        return padded.reshape(batch, down * height, across * width)[:, :rows, :columns].flatten().contiguous()

    def slices(self, unit: int) -> tuple[int, slice, slice]:
        """The position of a tile: its matrix in the batch, its rows and its columns."""
        (down, across), (height, width) = self.grid, self.tile
        place, column = divmod(unit, across)
        matrix, row = divmod(place, down)
        return matrix, slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)


class Structured(ParameterAllocator):
    """Whole rows, columns or square blocks, those with the highest summed scores; one unit at most is chosen in part.

    A tensor's last two axes are its matrix, axes before them make a batch of matrices (experts); the row of a matrix is
    a slice of the last axis. A vector (norm, bias) is a matrix with one column: its rows are single entries, its column
    is all of it. Blocks at the edges are smaller. A sum favours large units over small ones of the same average. Ties
    go to the first name, then the first unit of its tensor; within a unit to the first index.

    Args:
        unit: ``row``, ``column`` or ``block``.
        block_size: Height and width of a block; for ``unit: block`` alone.
        by: ``signed`` sums and ranks φ; ``magnitude`` |φ|.
    """

    def __init__(self, unit: Unit = "row", block_size: int = _BLOCK_SIZE, by: By = "signed") -> None:
        check_by("structured", by)
        if unit not in get_args(Unit):
            raise UserError(f"unit of structured is {unit!r}; give 'row', 'column' or 'block'.")
        if block_size < 1:
            raise UserError(f"block_size of structured is {block_size}; give at least 1.")
        if unit != "block" and block_size != _BLOCK_SIZE:
            raise UserError(
                f"block_size of structured is {block_size}, but unit is {unit!r}; leave it out, or give unit: block."
            )
        self.unit, self.block_size, self.by = unit, block_size, by

    def allocate(self, scores: Mapping[str, Float[Tensor, "..."]], budget: int) -> dict[str, Bool[Tensor, "..."]]:
        """Exactly ``budget`` entries (see `ParameterAllocator.allocate`); refuses a unit whose sum is not a number."""
        height, width = {"row": (1, None), "column": (None, 1), "block": (self.block_size,) * 2}[self.unit]
        tilings = {name: Tiling.of(scores[name].shape, height, width) for name in sorted(scores)}
        sums = torch.cat([self._sums(name, scores[name], tiling) for name, tiling in tilings.items()])
        order = torch.sort(sums, descending=True, stable=True).indices
        filled = torch.cat([tiling.sizes() for tiling in tilings.values()])[order].cumsum(0)
        whole = int((filled <= budget).sum())
        mask = _unit_masks(tilings, order[:whole])
        if left := budget - (int(filled[whole - 1]) if whole else 0):
            name, unit = _locate(tilings, int(order[whole]))
            shape, where = tilings[name].shape, tilings[name].slices(unit)
            best = Choice({"unit": scores[name].reshape(shape)[where]}, self.by)
            best.take(["unit"], left)
            mask[name].view(shape)[where] = best.mask["unit"].cpu()
        return {name: mask[name].view(score.shape).to(score.device) for name, score in scores.items()}

    def _sums(self, name: str, score: Float[Tensor, "..."], tiling: Tiling) -> Float[Tensor, " unit"]:
        sums = tiling.sums(ranked(score, self.by)).cpu()
        if bool(sums.isnan().any()):
            raise UserError(
                f"The scores of {name} hold NaN or infinities of both signs, which have no sum; score again."
            )
        return sums


def _unit_masks(tilings: Mapping[str, Tiling], chosen: Int[Tensor, " chosen"]) -> dict[str, Bool[Tensor, " entry"]]:
    """Parameter name -> which entries, flat, are in the chosen units; units are numbered across all tensors."""
    counts = [tiling.count for tiling in tilings.values()]
    units = torch.zeros(sum(counts), dtype=torch.bool)
    units[chosen] = True
    return {
        name: tiling.entries(part) for (name, tiling), part in zip(tilings.items(), units.split(counts), strict=True)
    }


def _locate(tilings: Mapping[str, Tiling], unit: int) -> tuple[str, int]:
    """The tensor that a unit is in, and its number in that tensor."""
    for name, tiling in tilings.items():
        if unit < tiling.count:
            return name, unit
        unit -= tiling.count
    raise ValueError("there is no such unit")
