"""The gradient of a linear layer's chosen weights alone, where these form few rectangles.

    y = a Wᵀ + b:     dW = eᵀ a,     and of rows R and columns C     dW[R, C] = e[:, R]ᵀ a[:, C],

with e the gradient of y, and tokens as rows of e and a. Whole rows, whole columns or blocks are a few such products, of
as many floating-point operations as there are chosen entries; the dense gradient, a third of a training step, is never
formed. Entries in any pattern would take a product for every row, which is slower than the dense one.

The layer's own backward is replaced. Other uses of its weight keep their ordinary gradient: a tied embedding, or an
enclosing module that uses the weight without calling the layer.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dualsft.models.linear import exchange

MOST_RECTANGLES, LEAST_ROWS = 256, 4
"""Most rectangles, and fewest rows of each on average, above and below which calls cost more than the products."""

_FIRST_ROWS = 2 * MOST_RECTANGLES
"""Rows that are looked at before all others."""

SHORTEST_RUN = 16
"""Mean length of runs of adjacent columns from which on they are copied run by run, and not gathered."""

LARGEST_SHARE = 0.75
"""Share of a layer's weights above which one dense product is as fast."""


@dataclass(frozen=True)
class Columns:
    """Some columns of a matrix.

    Attributes:
        index: The columns' numbers, ascending.
        runs: The same as runs of adjacent columns, where these are few: they are copied without a gather.
    """

    index: Int[Tensor, " place"]
    runs: tuple[slice, ...] = ()

    @staticmethod
    def of(index: Int[Tensor, " place"]) -> "Columns":
        """These columns, with their runs if they are long."""
        ends = [*((index[1:] - index[:-1]) != 1).nonzero().squeeze(1).tolist(), len(index) - 1]
        if len(ends) * SHORTEST_RUN > len(index) and len(ends) > 1:
            return Columns(index)
        starts = [0, *(end + 1 for end in ends[:-1])]
        return Columns(index, tuple(slice(int(index[a]), int(index[b]) + 1) for a, b in zip(starts, ends, strict=True)))

    def of_matrix(self, matrix: Float[Tensor, "token n"]) -> Float[Tensor, "token place"]:
        """These columns of a matrix; a view if they are one run."""
        if not self.runs:
            return matrix.index_select(1, self.index)
        parts = [matrix[:, run] for run in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@dataclass(frozen=True)
class Rectangle:
    """Some rows by some columns of a weight matrix.

    Attributes:
        entries: The rectangle's slice, row by row, of all chosen entries of the weight in row-major order.
    """

    rows: Columns
    columns: Columns
    entries: slice

    def to(self, device: torch.device) -> "Rectangle":
        """The same on another device."""
        rows, columns = (Columns(part.index.to(device), part.runs) for part in (self.rows, self.columns))
        return Rectangle(rows, columns, self.entries)


def rectangles(mask: Bool[Tensor, "m n"]) -> list[Rectangle] | None:
    """The rectangles that the chosen entries form: runs of rows with equal columns, ignoring empty rows.

    None if one dense product is faster: the rectangles are too many, or too large a part of the matrix. A scattered
    mask shows that in its first rows.
    """
    if len(_runs(mask[:_FIRST_ROWS])[2]) > _most_rectangles(len(mask)) or mask.sum() > LARGEST_SHARE * mask.numel():
        return None
    rows, filled, starts = _runs(mask)
    if not len(rows) or len(starts) > _most_rectangles(len(rows)):
        return None
    parts, first = [], 0
    for k, group in enumerate(rows.tensor_split(starts[1:].cpu())):
        columns = filled[starts[k]].nonzero().squeeze(1)
        size = len(group) * len(columns)
        parts.append(Rectangle(Columns.of(group), Columns.of(columns), slice(first, first + size)))
        first += size
    return parts


def _most_rectangles(rows: int) -> int:
    return min(MOST_RECTANGLES, max(4, rows // LEAST_ROWS))


def _runs(mask: Bool[Tensor, "m n"]) -> tuple[Int[Tensor, " row"], Bool[Tensor, "row n"], Int[Tensor, " run"]]:
    """The numbers of the rows that are not empty, these rows, and where among them each run of equal ones starts."""
    rows = mask.any(1).nonzero().squeeze(1)
    filled = mask[rows]
    return rows, filled, torch.cat([rows.new_zeros(1), (filled[1:] != filled[:-1]).any(1).nonzero().squeeze(1) + 1])


def chosen_products(
    x: Float[Tensor, "token m"], y: Float[Tensor, "token n"], parts: list[Rectangle]
) -> Float[Tensor, " selected"]:
    """The entries of xᵀ y in these rectangles, in row-major order of the full matrix."""
    chosen = x.new_empty(parts[-1].entries.stop)
    for part in parts:
        left, right = part.rows.of_matrix(x), part.columns.of_matrix(y)
        torch.mm(left.t(), right, out=chosen[part.entries].view(left.shape[1], right.shape[1]))
    return chosen


class ChosenGradientHook:
    """A forward hook after which a linear layer's backward computes its chosen weights' gradient only.

    Args:
        module: The layer.
        master: The parameter that gets the gradient of the chosen weights, in row-major order; of shape (selected,).
        parts: The rectangles that the chosen weights form.
    """

    def __init__(self, module: nn.Module, master: nn.Parameter, parts: list[Rectangle]) -> None:
        self._transposed = type(module) is Conv1D
        self._master, self._parts = master, parts

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        """The module's output with the replaced backward; None (the output stays) where gradients are disabled."""
        if not torch.is_grad_enabled():
            return None
        (a,) = args or kwargs.values()
        return exchange(module, a, output, self._master, self, weight_too=False)

    def backward(
        self, e: Tensor, a: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of the input and of the master, where needed; see `LinearBackward`."""
        needs_input, _, needs_master = needs
        inward = weight.t() if self._transposed else weight
        da = (e @ inward.to(e.dtype)).to(a.dtype) if needs_input else None
        if not needs_master:
            return da, None, None
        if self._parts[0].rows.index.device != e.device:  # the model has been moved since
            self._parts = [part.to(e.device) for part in self._parts]
        x, y = e.reshape(-1, e.shape[-1]), a.to(e.dtype).reshape(-1, a.shape[-1])
        chosen = chosen_products(y, x, self._parts) if self._transposed else chosen_products(x, y, self._parts)
        return da, None, chosen.to(self._master.dtype)
