"""Examples -> packed rows -> batches: several examples end to end in a row, instead of one padded example per row.

A batch of r rows whose fullest has t tokens costs r·t tokens. The limits are the same throughout:

    row_tokens                   largest row in tokens; no row is larger than a batch either
    batch_tokens                 largest r·t of a batch
    batch_size, max_examples     largest number of examples of a batch or row; None for no limit

An example that is longer than a row can be is a `UserError`. Each example occurs once in the result.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from heapq import heappop, heappush
from itertools import accumulate, chain, takewhile
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dualsft.data.layout import Batch
from dualsft.data.supervision import IGNORED
from dualsft.errors import UserError

Row = list[int]
"""Ids of the examples that are end to end in one row."""
Lengths = Sequence[int] | Int[np.ndarray, "example"]
"""Tokens of every example, indexed by example id."""
Ids = Sequence[int] | Int[np.ndarray, "chosen"]
"""Ids of some examples."""


def collate_packed(rows: Sequence[Sequence[Mapping[str, Any]]], pad_token_id: int) -> Batch:
    """Lays each row's examples (example_id, input_ids, labels) end to end and pads the rows to the fullest."""
    lengths = [[len(example["input_ids"]) for example in row] for row in rows]
    width = max(map(sum, lengths))
    positions = [_joined(range(length) for length in [*row, width - sum(row)]) for row in lengths]
    ids = [_joined(example["input_ids"] for example in row) for row in rows]
    # the token before an example's first one belongs to another example, which does not predict it
    labels = [_joined([IGNORED, *example["labels"][1:]] for example in row) for row in rows]
    spans = [
        (place, first, length)
        for place, row in enumerate(lengths)
        for first, length in zip(accumulate(row, initial=0), row, strict=False)
    ]
    return {
        "example_id": torch.tensor([example["example_id"] for row in rows for example in row], dtype=torch.int64),
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        "position_ids": torch.stack(positions),
        "spans": torch.tensor(spans, dtype=torch.int64),
    }


def _joined(parts: Iterable[Iterable[int]]) -> Int[Tensor, " t"]:
    return torch.tensor(list(chain.from_iterable(parts)), dtype=torch.int64)


def pack_rows(lengths: Lengths, ids: Ids, row_tokens: int, max_examples: int | None = None) -> list[Row]:
    """Packs examples into few rows: the longest first, each into the fullest row that has room for it.

    This is best-fit decreasing, which needs at most 11/9 of the minimum number of rows (plus one); with lengths of real
    text almost no slot stays empty. The rows are in the order in which they were begun.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    rows: list[Row] = []
    open_rows = _OpenRows()
    for example_id in longest_first(lengths, ids).tolist():
        length = int(lengths[example_id])
        if length > row_tokens:
            raise UserError(
                f"Example {example_id} has {length} tokens, more than fit into a row of {row_tokens}: "
                "raise data.batch_tokens or lower data.max_length."
            )
        row, room = open_rows.take(length) or (len(rows), row_tokens)
        if row == len(rows):
            rows.append([])
        rows[row].append(example_id)
        if max_examples is None or len(rows[row]) < max_examples:
            open_rows.add(row, room - length)
    return rows


def longest_first(lengths: Int[np.ndarray, " example"], ids: Ids) -> Int[np.ndarray, " chosen"]:
    """The ids by length, the longest first and ties in order of id."""
    chosen = np.asarray(ids, dtype=np.int64)
    return chosen[np.lexsort((chosen, -lengths[chosen]))]


class _OpenRows:
    """Rows that may take another example, found by their room; the earliest begun among those with equal room."""

    def __init__(self) -> None:
        self._rooms: list[int] = []  # each once, ascending
        self._rows: dict[int, list[int]] = {}  # room -> heap of rows

    def add(self, row: int, room: int) -> None:
        """Adds a row."""
        if room not in self._rows:
            insort(self._rooms, room)
            self._rows[room] = []
        heappush(self._rows[room], row)

    def take(self, length: int) -> tuple[int, int] | None:
        """Removes and returns the row with the least room for ``length`` tokens, and that room; None if no row fits."""
        place = bisect_left(self._rooms, length)
        if place == len(self._rooms):
            return None
        room = self._rooms[place]
        row = heappop(self._rows[room])
        if not self._rows[room]:
            del self._rows[room], self._rooms[place]
        return row, room


def packed_batches(
    lengths: Lengths,
    batch_tokens: int,
    row_tokens: int,
    batch_size: int | None = None,
    ids: Ids | None = None,
) -> list[list[Row]]:
    """Packs examples into rows and cuts these into batches, the fullest first: too large ones fail at once."""
    lengths = np.asarray(lengths, dtype=np.int64)
    rows = pack_rows(lengths, range(len(lengths)) if ids is None else ids, min(row_tokens, batch_tokens), batch_size)
    rows.sort(key=lambda row: -_tokens(lengths, row))
    batches: list[list[Row]] = []
    width = examples = 0
    for row in rows:
        full = not batches or (len(batches[-1]) + 1) * width > batch_tokens
        if full or (batch_size is not None and examples + len(row) > batch_size):
            batches.append([])
            width, examples = _tokens(lengths, row), 0
        batches[-1].append(row)
        examples += len(row)
    return batches


def few_packed_batches(
    lengths: Lengths, batch_tokens: int, row_tokens: int, batch_size: int, ids: Ids
) -> list[list[Row]]:
    """Packs examples into as few batches as can be found, for training: every batch is an optimizer step.

    Full rows make few batches where tokens are the limit. Where the number of examples is, they make too many: with 11
    examples to a row and 16 to a batch, no second row fits. There the examples are first distributed over fewer batches
    and then laid into rows, which need not be full.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    full = packed_batches(lengths, batch_tokens, row_tokens, batch_size, ids)
    fewest = max(-(-len(ids) // batch_size), -(-_tokens(lengths, ids) // batch_tokens))
    for count in range(fewest, len(full)):
        parts = _balanced(lengths, ids, count, batch_size)
        rows = (_balanced_rows(lengths, batch_tokens, row_tokens, part) for part in parts)
        batches = list(takewhile(bool, rows))
        if len(batches) == len(parts):
            return batches
    return full


def _balanced_rows(
    lengths: Int[np.ndarray, " example"], batch_tokens: int, row_tokens: int, ids: list[int]
) -> list[Row]:
    """Few rows of nearly equal length for one batch; none if such rows would exceed a limit."""
    fewest = max(1, -(-_tokens(lengths, ids) // row_tokens))
    layouts = [_balanced(lengths, ids, count) for count in range(fewest, fewest + 3)]  # still more rows only pad more
    widths = [max(_tokens(lengths, row) for row in rows) for rows in layouts]
    fitting = [
        (len(rows) * width, rows)
        for rows, width in zip(layouts, widths, strict=True)
        if width <= row_tokens and len(rows) * width <= batch_tokens
    ]
    return min(fitting)[1] if fitting else []


def _balanced(
    lengths: Int[np.ndarray, " example"], ids: Ids, count: int, max_examples: int | None = None
) -> list[list[int]]:
    """Distributes examples over at most ``count`` parts, the longest first, each to the part with the fewest tokens."""
    parts: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, place) for place in range(count)]
    for example_id in longest_first(lengths, ids).tolist():
        tokens, place = heappop(heap)
        parts[place].append(example_id)
        if max_examples is None or len(parts[place]) < max_examples:
            heappush(heap, (tokens + int(lengths[example_id]), place))
    return [part for part in parts if part]


def _tokens(lengths: Int[np.ndarray, " example"], ids: Ids) -> int:
    return int(lengths[np.asarray(ids, dtype=np.int64)].sum())
