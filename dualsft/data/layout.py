"""A batch of examples, how it is sliced, and which of its tokens belong to which example.

A batch is a rectangle of rows and tokens. An example is a span of one row: (row, first token, length). Rows are either
padded, with one example each, or packed, with several. Values of tokens, such as losses or a module's output, are split
into examples here and nowhere else.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from dualsft.errors import UserError

Batch = dict[str, Tensor]
"""Examples as a model takes them: int64 tensors by name.

    example_id       (example)
    input_ids        (row, token)
    labels           (row, token)    -100 where a token is not supervised
    attention_mask   (row, token)    of right-padded rows alone: 0 for padding
    position_ids     (row, token)    of packed rows alone
    spans            (example, 3)    of packed rows alone: row, first token and length of each example

Padded rows hold one example each, in the order of ``example_id``. Packed rows have no mask of padding: positions count
from 0 in each example, and again in the padding behind the last one, so that a model that keeps attention between two
zeros keeps padding apart as well.
"""

BY_EXAMPLE = ("example_id", "spans")
"""The tensors of a batch with an entry for each example; the others have one for each token."""


def num_tokens(batch: Batch) -> int:
    """Tokens of a batch, without its padding."""
    return int(batch["spans"][:, 2].sum() if "spans" in batch else batch["attention_mask"].sum())


class AmbiguousShapeError(Exception):
    """Two axes of an output have the same length, so the one that counts rows or tokens is ambiguous.

    After `widen` adds one token of padding to every row, their lengths differ.
    """


class Layout:
    """The examples' spans in a batch; splits values of rows and tokens into examples.

    Args:
        rows: Rows of the batch.
        tokens: Tokens of each row, padding included.
        spans: (row, first token, length) of each example, in the order of the batch's ``example_id``.

    Attributes:
        one_per_row: Whether example k is the only one of row k and begins at its first token.
    """

    def __init__(self, rows: int, tokens: int, spans: Sequence[tuple[int, int, int]]) -> None:
        self.rows, self.tokens, self.spans = rows, tokens, tuple(spans)
        self.one_per_row = [(row, first) for row, first, _ in self.spans] == [(row, 0) for row in range(rows)]
        self._part: Layout | None = None

    @classmethod
    def of(cls, batch: Batch) -> "Layout":
        """The layout of a padded or packed batch; waits for the device if the host has lost sight of the batch."""
        batch = on_host(batch)
        rows, tokens = batch["input_ids"].shape
        if "spans" in batch:
            return cls(rows, tokens, [(row, first, length) for row, first, length in batch["spans"].tolist()])
        lengths = batch["attention_mask"].sum(1).tolist()
        return cls(rows, tokens, [(row, 0, length) for row, length in enumerate(lengths)])

    @property
    def current(self) -> "Layout":
        """The layout of what modules are called with just now: this one, or that of a part of the batch."""
        return self if self._part is None else self._part

    @contextmanager
    def holding(self, part: "Layout") -> Iterator[None]:
        """Tell that modules are called with a part of the batch alone while the context is open."""
        before, self._part = self._part, part
        try:
            yield
        finally:
            self._part = before

    @property
    def mean_length(self) -> float:
        """Tokens per example, padding left out."""
        return sum(length for _, _, length in self.spans) / max(len(self.spans), 1)

    def by_example(self, values: Float[Tensor, "row token"]) -> Float[Tensor, "example longest"]:
        """Rearrange values of tokens to one row per example, zero after its end.

        This is a gather, whose gradient adds up in the same order every time.
        """
        if self.one_per_row:
            return values
        index, inside = (part.to(values.device) for part in self._gather)
        return values.flatten()[index] * inside

    @cached_property
    def _gather(self) -> tuple[Int[Tensor, "example longest"], Bool[Tensor, "example longest"]]:
        row, first, length = torch.tensor(self.spans, dtype=torch.int64).view(-1, 3).unbind(1)
        steps = torch.arange(max((n for _, _, n in self.spans), default=0))
        inside = steps < length[:, None]
        return ((row * self.tokens + first)[:, None] + steps).where(inside, 0), inside

    def token_axes(self, shape: Sequence[int]) -> list[int]:
        """The axes of an output's shape, after the axis of rows, that are as long as a row."""
        if not shape or shape[0] != self.rows:
            return []
        return [axis for axis in range(1, len(shape)) if shape[axis] == self.tokens]

    def token_axis(self, shape: Sequence[int], where: str) -> int:
        """The axis of a module's output that counts tokens; 0 if rows and tokens are flattened into one.

        Raises:
            AmbiguousShapeError: if two axes are as long as a row, or the first may count either.
            UserError: if the output has neither rows and tokens nor flattened tokens.
        """
        self.check_rows(shape, where)
        axes = self.token_axes(shape)
        if len(axes) > 1:
            raise AmbiguousShapeError(where)
        if not axes and shape[0] != self.rows * self.tokens:
            raise self._cannot_split(shape, where)
        return axes[0] if axes else 0

    def check_rows(self, shape: Sequence[int], where: str) -> None:
        """Check that a module's output splits into rows; an axis of tokens is not needed.

        Raises:
            AmbiguousShapeError: if its first axis may count tokens of an output without rows (learned positions).
            UserError: if it does not split.
        """
        if shape and shape[0] == self.rows == self.tokens > 1:
            raise AmbiguousShapeError(where)
        if not shape or shape[0] not in (self.rows, self.rows * self.tokens):
            raise self._cannot_split(shape, where)

    def _cannot_split(self, shape: Sequence[int], where: str) -> UserError:
        held = f"{self.rows} {'examples' if self.one_per_row else 'rows'} of {self.tokens} tokens"
        return UserError(
            f"The output of {where} has shape {tuple(shape)}, which cannot be split into {held}; freeze its parameters "
            "(requires_grad=False) to leave it out of the scores."
        )

    def by_token(self, values: Tensor, where: str) -> Float[Tensor, "row token rest"]:
        """A module's output with the axes of rows and tokens first; raises what `token_axis` raises."""
        axis = self.token_axis(values.shape, where)
        ordered = values.movedim(axis, 1) if axis else values
        return ordered.reshape(self.rows, self.tokens, -1)

    def flat(self, values: Tensor, axis: int) -> Float[Tensor, "flat rest"]:
        """A module's output with rows and tokens as one axis, given the axis that counts tokens."""
        return values.movedim(axis, 1).reshape(self.rows * self.tokens, -1)

    def expand(self, output: Tensor) -> Tensor:
        """The output with one row per row of the batch, also if the model computes one for all (learned positions)."""
        if output.dim() > 2 and output.shape[0] == 1 < self.rows and output.shape[1] == self.tokens:
            return output.expand(self.rows, *output.shape[1:])
        return output


class PlacedBatch(Batch):
    """A batch on a device, and beside it as the host had it, so that a look at it waits for nothing.

    Attributes:
        host: The batch on the host.
    """

    def __init__(self, host: Batch, device: torch.device) -> None:
        super().__init__({name: _moved(values, device) for name, values in host.items()})
        self.host, self._device = host, device

    @cached_property
    def predicting(self) -> Int[Tensor, " supervised"]:
        """See `predicting`."""
        return _moved(_predicting(self.host["labels"]), self._device)


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """The values on a device; the host does not wait for an accelerator to take its own, of which a copy is pinned."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def predicting(batch: Batch) -> Int[Tensor, " supervised"]:
    """Where the tokens before supervised ones are, among the tokens of all rows; found on the host if it has them."""
    return batch.predicting if isinstance(batch, PlacedBatch) else _predicting(batch["labels"])


def _predicting(labels: Int[Tensor, "row token"]) -> Int[Tensor, " supervised"]:
    is_supervised = F.pad(labels[:, 1:] != -100, (0, 1))
    return is_supervised.flatten().nonzero().squeeze(1)


def to_device(batch: Batch, device: torch.device) -> PlacedBatch:
    """The batch on this device."""
    return PlacedBatch(on_host(batch), device)


def on_host(batch: Batch) -> Batch:
    """The batch as the host had it; if it was moved by other means than `to_device`, the batch itself."""
    return batch.host if isinstance(batch, PlacedBatch) else batch


def select_rows(batch: Batch, rows: Sequence[int], tokens: slice = slice(None)) -> Batch:
    """Select rows of a batch, ascending, with the examples in them; ``tokens`` must include these examples."""
    index = torch.tensor(rows, dtype=torch.int64, device=batch["input_ids"].device)
    part = {name: values[index, tokens] for name, values in batch.items() if name not in BY_EXAMPLE}
    if "spans" not in batch:
        return {"example_id": batch["example_id"][index], **part}
    kept = torch.isin(batch["spans"][:, 0], index)
    row, first, length = batch["spans"][kept].unbind(1)
    spans = torch.stack([torch.searchsorted(index, row.contiguous()), first, length], 1)
    return {"example_id": batch["example_id"][kept], "spans": spans, **part}


def split_rows(batch: Batch, parts: int) -> list[Batch]:
    """Split a batch into at most this many parts of consecutive rows, as even as possible."""
    return [select_rows(batch, rows.tolist()) for rows in torch.arange(len(batch["input_ids"])).chunk(parts)]


def unlabelled(batch: Batch) -> Batch:
    """The same rows without a label: for a call of the model that counts for nothing."""
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


def one_example(batch: Batch, k: int) -> Batch:
    """A batch of the k-th example alone, without padding."""
    row, first, length = Layout.of(batch).spans[k]
    alone = select_rows(batch, [row], slice(first, first + length))
    alone["example_id"] = batch["example_id"][k : k + 1]
    if "spans" in batch:
        alone["spans"] = torch.tensor([[0, 0, length]])
    return alone


def keep_examples(batch: Batch, keep: Bool[Tensor, " example"]) -> Batch:
    """The batch without some of its examples: padded ones are dropped, and the tokens of packed ones become padding."""
    if bool(keep.all()):
        return batch
    if "spans" not in batch:
        return select_rows(batch, keep.nonzero().flatten().tolist())
    input_ids, labels = batch["input_ids"].clone(), batch["labels"].clone()
    for row, first, length in batch["spans"][~keep.to(batch["spans"].device)].tolist():
        input_ids[row, first : first + length] = 0
        labels[row, first : first + length] = -100
    kept = {name: batch[name][keep.to(batch[name].device)] for name in BY_EXAMPLE}
    return {**batch, **kept, "input_ids": input_ids, "labels": labels}


def widen(batch: Batch) -> Batch:
    """The batch with one more token of padding at the end of every row."""
    return {
        name: values if name in BY_EXAMPLE else F.pad(values, (0, 1), value=-100 if name == "labels" else 0)
        for name, values in batch.items()
    }
