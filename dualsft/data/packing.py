"""Examples -> rows: several examples end to end in one row of a batch, instead of one each and padding behind it."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from heapq import heappop, heappush
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from dualsft.data.layout import Batch
from dualsft.data.supervision import IGNORED
from dualsft.errors import UserError


def collate_packed(rows: Sequence[Sequence[Mapping[str, Any]]], pad_token_id: int) -> Batch:
    """Lays each row's examples (example_id, input_ids, labels) end to end and pads the rows to the fullest."""
    lengths = [[len(example["input_ids"]) for example in row] for row in rows]
    width = max(map(sum, lengths))
    positions = [_chained(range(length) for length in [*row, width - sum(row)]) for row in lengths]
    ids = [_chained(example["input_ids"] for example in row) for row in rows]
    labels = [_chained(_without_first(example["labels"]) for example in row) for row in rows]
    return {
        "example_id": torch.tensor([example["example_id"] for row in rows for example in row], dtype=torch.int64),
        "input_ids": _filled(ids, width, pad_token_id),
        "labels": _filled(labels, width, IGNORED),
        "position_ids": torch.tensor(positions, dtype=torch.int64),
        "spans": _spans(lengths),
    }


def _chained(parts: Iterable[Iterable[int]]) -> list[int]:
    return [value for part in parts for value in part]


def _without_first(labels: Sequence[int]) -> list[int]:
    """The labels of an example; what stands before its first token in the row is another example's."""
    return [IGNORED if place == 0 else label for place, label in enumerate(labels)]


def _filled(rows: list[list[int]], width: int, value: int) -> Int[Tensor, "r t"]:
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.int64)


def _spans(lengths: list[list[int]]) -> Int[Tensor, "n 3"]:
    spans = [
        (place, first, length)
        for place, row in enumerate(lengths)
        for first, length in zip(accumulate(row, initial=0), row, strict=False)
    ]
    return torch.tensor(spans, dtype=torch.int64)


def pack_rows(
    lengths: Sequence[int] | Int[np.ndarray, "example"],
    ids: Sequence[int],
    row_tokens: int,
    max_examples: int | None = None,
) -> list[list[int]]:
    """Packs examples into few rows: the longest first, each into the fullest row that has room for it.

    This is best-fit decreasing, which needs at most 11/9 of the fewest rows there could be (and a row more); with the
    lengths of real text it leaves next to nothing empty.

    Args:
        lengths: Tokens of every example, indexed by example id.
        ids: Examples to pack.
        row_tokens: Largest row in tokens.
        max_examples: Largest number of examples in a row, if there is to be one.

    Returns:
        Rows of example ids, in the order in which they were begun; each id occurs once.

    Raises:
        UserError: If an example is longer than ``row_tokens``.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    rows: list[list[int]] = []
    open_rows = _OpenRows()
    for example_id in longest_first(lengths, ids):
        length = int(lengths[example_id])
        _check_fits(example_id, length, row_tokens)
        row, room = open_rows.take(length) or (len(rows), row_tokens)
        if row == len(rows):
            rows.append([])
        rows[row].append(example_id)
        if max_examples is None or len(rows[row]) < max_examples:
            open_rows.add(row, room - length)
    return rows


def longest_first(lengths: Int[np.ndarray, "example"], ids: Sequence[int] | Int[np.ndarray, "chosen"]) -> list[int]:
    """The ids by length, the longest first and ties in order of id."""
    chosen = np.asarray(ids, dtype=np.int64)
    ordered: list[int] = chosen[np.lexsort((chosen, -lengths[chosen]))].tolist()
    return ordered


def _check_fits(example_id: int, length: int, row_tokens: int) -> None:
    if length > row_tokens:
        raise UserError(
            f"Example {example_id} has {length} tokens, more than fit into a row of {row_tokens}: "
            "raise data.batch_tokens or lower data.max_length."
        )


class _OpenRows:
    """Rows that may take another example, found by their room; the earliest begun among those with equal room."""

    def __init__(self) -> None:
        self._rooms: list[int] = []  # each once, ascending
        self._rows: dict[int, list[int]] = {}  # room -> heap of rows

    def add(self, row: int, room: int) -> None:
        """Takes in a row."""
        if room not in self._rows:
            insort(self._rooms, room)
            self._rows[room] = []
        heappush(self._rows[room], row)

    def take(self, length: int) -> tuple[int, int] | None:
        """Takes out the row with the least room for ``length`` tokens and tells that room; None if no row has it."""
        place = bisect_left(self._rooms, length)
        if place == len(self._rooms):
            return None
        room = self._rooms[place]
        row = heappop(self._rows[room])
        if not self._rows[room]:
            del self._rows[room], self._rooms[place]
        return row, room
