"""Which tokens of a batch belong to which example: one example to a row, padded, or several packed into each row.

A batch is a rectangle of rows and tokens. An example is a span of one row: (row, first token, length). Whatever has a
value for each token, such as a loss or a module's output, is brought to examples here and nowhere else.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from dualsft.errors import UserError

Batch = dict[str, Tensor]
"""``example_id`` (example), ``input_ids`` and ``labels`` (row, token), and either ``attention_mask`` (row, token) of
right-padded rows with one example each, or ``position_ids`` (row, token) and ``spans`` (example, 3) of packed rows."""


class AmbiguousShapeError(Exception):
    """An output whose rows or tokens cannot be told from another axis of that size; a wider batch has no such doubt."""


class Layout:
    """Which tokens belong to which example.

    Args:
        rows: Rows of the batch.
        tokens: Tokens of each row, padding included.
        spans: (row, first token, length) of each example, in the order of the batch's ``example_id``.
    """

    def __init__(self, rows: int, tokens: int, spans: Sequence[tuple[int, int, int]]) -> None:
        self.rows, self.tokens, self.spans = rows, tokens, tuple(spans)
        self.whole_rows = [(row, first) for row, first, _ in self.spans] == [(row, 0) for row in range(rows)]

    @classmethod
    def of(cls, batch: Batch) -> "Layout":
        """The layout of a padded or packed batch; waits for the device."""
        rows, tokens = batch["input_ids"].shape
        if "spans" in batch:
            return cls(rows, tokens, [(row, first, length) for row, first, length in batch["spans"].tolist()])
        lengths = batch["attention_mask"].sum(1).tolist()
        return cls(rows, tokens, [(row, 0, length) for row, length in enumerate(lengths)])

    @property
    def mean_length(self) -> float:
        """Tokens per example, padding left out."""
        return sum(length for _, _, length in self.spans) / max(len(self.spans), 1)

    def by_example(self, values: Float[Tensor, "row token"]) -> Float[Tensor, "example longest"]:
        """One row per example, zero after its end; a gather, whose sums are the same bits every time."""
        if self.whole_rows:
            return values
        where, inside = (part.to(values.device) for part in self._gather)
        return values.flatten()[where] * inside

    @cached_property
    def _gather(self) -> tuple[Int[Tensor, "example longest"], Bool[Tensor, "example longest"]]:
        row, first, length = torch.tensor(self.spans, dtype=torch.int64).view(-1, 3).unbind(1)
        steps = torch.arange(max((n for _, _, n in self.spans), default=0))
        inside = steps < length[:, None]
        return ((row * self.tokens + first)[:, None] + steps).where(inside, 0), inside

    def token_axes(self, shape: Sequence[int]) -> list[int]:
        """The axes of an output of rows that are as long as a row."""
        if not shape or shape[0] != self.rows:
            return []
        return [axis for axis in range(1, len(shape)) if shape[axis] == self.tokens]

    def token_axis(self, shape: Sequence[int], where: str) -> int:
        """The axis of a module's output that counts tokens; 0 if rows and tokens are flattened into one.

        Raises:
            AmbiguousShapeError: if two axes are as long as a row, or the first may count either.
            UserError: if the output has neither rows and tokens nor flattened tokens.
        """
        self._check_square(shape, where)
        axes = self.token_axes(shape)
        if axes:
            if len(axes) > 1:
                raise AmbiguousShapeError(where)
            return axes[0]
        if shape and shape[0] == self.rows * self.tokens:
            return 0
        raise self._strange(shape, where)

    def check_rows(self, shape: Sequence[int], where: str) -> None:
        """See that an output splits into rows, whichever axis counts tokens, if any does.

        Raises:
            AmbiguousShapeError: if its first axis may count either.
            UserError: if it does not split.
        """
        self._check_square(shape, where)
        if not shape or shape[0] not in (self.rows, self.rows * self.tokens):
            raise self._strange(shape, where)

    def _check_square(self, shape: Sequence[int], where: str) -> None:
        """See that the first axis does not count tokens of nobody's (learned positions), as many as there are rows."""
        if shape and shape[0] == self.rows == self.tokens:
            raise AmbiguousShapeError(where)

    def _strange(self, shape: Sequence[int], where: str) -> UserError:
        held = f"{self.rows} {'examples' if self.whole_rows else 'rows'} of {self.tokens} tokens"
        return UserError(
            f"The output of {where} has shape {tuple(shape)}, which cannot be split into {held}; freeze its parameters "
            "(requires_grad=False) to leave it out of the scores."
        )

    def by_token(self, values: Tensor, where: str) -> Float[Tensor, "row token rest"]:
        """Bring a module's output to rows and tokens; see `token_axis` for what is raised."""
        axis = self.token_axis(values.shape, where)
        ordered = values.movedim(axis, 1) if axis else values
        return ordered.reshape(self.rows, self.tokens, -1)

    def flat(self, values: Tensor, axis: int) -> Float[Tensor, "flat rest"]:
        """Flatten rows and tokens of a module's output into one, given the axis that counts tokens."""
        return values.movedim(axis, 1).reshape(self.rows * self.tokens, -1)

    def expand(self, output: Tensor) -> Tensor:
        """Give an output that is shared by the whole batch (learned positions) rows of its own."""
        if output.dim() > 2 and output.shape[0] == 1 < self.rows and output.shape[1] == self.tokens:
            return output.expand(self.rows, *output.shape[1:])
        return output


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on this device."""
    return {name: values.to(device) for name, values in batch.items()}


def only(batch: Batch, k: int) -> Batch:
    """The batch's k-th example alone, without padding."""
    row, first, length = Layout.of(batch).spans[k]
    alone = {
        name: values[row : row + 1, first : first + length]
        for name, values in batch.items()
        if name not in ("example_id", "spans")
    }
    if "spans" in batch:
        alone["spans"] = torch.tensor([[0, 0, length]])
    return {"example_id": batch["example_id"][k : k + 1], **alone}


def without(batch: Batch, keep: Bool[Tensor, " example"]) -> Batch:
    """The batch without some of its examples: their rows go, or, where rows are shared, their tokens become padding."""
    if bool(keep.all()):
        return batch
    if "spans" not in batch:
        return {name: values[keep.to(values.device)] for name, values in batch.items()}
    input_ids, labels = batch["input_ids"].clone(), batch["labels"].clone()
    for row, first, length in batch["spans"][~keep.to(batch["spans"].device)].tolist():
        input_ids[row, first : first + length] = 0
        labels[row, first : first + length] = -100
    kept = {name: batch[name][keep.to(batch[name].device)] for name in ("example_id", "spans")}
    return {**batch, **kept, "input_ids": input_ids, "labels": labels}


def widen(batch: Batch) -> Batch:
    """The batch with one more token of padding at the end of every row."""
    filler = {"input_ids": 0, "labels": -100, "attention_mask": 0, "position_ids": 0}
    return {
        name: F.pad(values, (0, 1), value=filler[name]) if name in filler else values for name, values in batch.items()
    }


def split(batch: Batch, parts: int) -> list[Batch]:
    """The batch in at most this many parts of whole rows, as even as can be."""
    pieces = [rows.tolist() for rows in torch.arange(len(batch["input_ids"])).chunk(parts)]
    return [_rows(batch, rows[0], rows[-1] + 1) for rows in pieces]


def _rows(batch: Batch, first: int, end: int) -> Batch:
    if "spans" not in batch:
        return {name: values[first:end] for name, values in batch.items()}
    inside = (batch["spans"][:, 0] >= first) & (batch["spans"][:, 0] < end)
    spans = batch["spans"][inside] - torch.tensor([first, 0, 0], device=batch["spans"].device)
    tokens = {n: v[first:end] for n, v in batch.items() if n not in ("example_id", "spans")}
    return {"example_id": batch["example_id"][inside], "spans": spans, **tokens}
