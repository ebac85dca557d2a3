"""Examples -> batches: padding, and which examples share a batch.

A batch of b rows whose longest has t tokens costs b·t tokens, padding included. Both ways of batching keep that within
a budget and keep padding low by putting examples of similar length together. Where examples are packed, a row holds
several of them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from dualsft.data.batch_plan import BatchPlan
from dualsft.data.layout import Batch
from dualsft.data.packing import Ids, Lengths, Row, few_packed_batches, longest_first
from dualsft.data.supervision import IGNORED
from dualsft.errors import UserError

BatchIds = list[int] | list[Row]
"""Ids of a batch's examples: one to a row, or packed into rows."""

_WINDOW = 16  # batches' worth of examples that are sorted by length together: little padding, yet well mixed


def collate(rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> Batch:
    """Pads rows of (example_id, input_ids, labels) on the right to the longest; padding has mask 0 and label -100."""
    input_ids = [torch.tensor(row["input_ids"], dtype=torch.int64) for row in rows]
    labels = [torch.tensor(row["labels"], dtype=torch.int64) for row in rows]
    masks = [torch.ones_like(ids) for ids in input_ids]
    return {
        "example_id": torch.tensor([row["example_id"] for row in rows], dtype=torch.int64),
        "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence(masks, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def length_batches(
    lengths: Lengths, batch_tokens: int, batch_size: int | None = None, ids: Ids | None = None
) -> BatchPlan:
    """Cuts examples into batches by length, the longest first: a batch too large for memory fails at once.

    Args:
        lengths: Tokens of every example.
        batch_tokens: Largest (examples x longest) of a batch.
        batch_size: Largest number of examples of a batch; None for no limit.
        ids: Examples to batch; all of them by default. Ties in length are in order of id.

    Raises:
        UserError: If an example is longer than ``batch_tokens``.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = longest_first(lengths, np.arange(len(lengths)) if ids is None else ids)
    return BatchPlan(order, np.array(_sizes(lengths, order, batch_tokens, batch_size), dtype=np.int64))


def _sizes(
    lengths: Int[np.ndarray, " example"], order: Int[np.ndarray, " chosen"], batch_tokens: int, batch_size: int | None
) -> list[int]:
    """How many of the ids, the longest first, each batch takes."""
    sizes: list[int] = []
    first = 0
    while first < len(order):
        longest = int(lengths[order[first]])
        if longest > batch_tokens:
            raise UserError(
                f"Example {order[first]} has {longest} tokens, more than data.batch_tokens={batch_tokens}: "
                "raise data.batch_tokens or lower data.max_length."
            )
        fitting = batch_tokens // max(longest, 1)
        sizes.append(min(fitting, len(order) - first, *([] if batch_size is None else [batch_size])))
        first += sizes[-1]
    return sizes


def padding_share(lengths: Lengths, batches: Iterable[BatchIds]) -> float:
    """Share of the batches' token slots (rows x fullest row) that hold padding; 0 without any batch."""
    slots = tokens = 0
    for rows in _row_tokens(lengths, batches):
        slots += len(rows) * int(rows.max())
        tokens += int(rows.sum())
    return 1 - tokens / slots if slots else 0.0


def tokens_in(lengths: Lengths, batches: Iterable[BatchIds]) -> int:
    """Tokens of the examples in some batches, without padding."""
    return sum(int(rows.sum()) for rows in _row_tokens(lengths, batches))


def _row_tokens(lengths: Lengths, batches: Iterable[BatchIds]) -> Iterator[np.ndarray]:
    """Tokens of each row of each batch."""
    lengths = np.asarray(lengths, dtype=np.int64)
    for batch in batches:
        packed = [row for row in batch if isinstance(row, list)]
        yield np.array([lengths[row].sum() for row in packed]) if packed else lengths[batch]


class TrainingBatches(Sampler[BatchIds]):
    """A fixed set of batches for training, in a new order each epoch.

    The examples are shuffled once and cut into windows of 16 batches; each window is sorted by length and cut, or
    packed, under both limits. The number of steps per epoch is thus known and constant.

    Args:
        lengths: Tokens of every example.
        ids: Examples to train on.
        batch_tokens: Largest (rows x longest row) of a batch.
        batch_size: Largest number of examples of a batch.
        seed: Decides which examples meet in a batch and, with the epoch, the order of the batches.
        row_tokens: Largest row in tokens if examples are to be packed; else each has a row of its own.

    Raises:
        UserError: If an example is longer than ``batch_tokens``, or packed and longer than a row can be.
    """

    def __init__(
        self,
        lengths: Lengths,
        ids: Ids,
        batch_tokens: int,
        batch_size: int,
        seed: int = 0,
        row_tokens: int | None = None,
    ) -> None:
        self.seed = seed
        self.epoch = 0
        shuffled = np.random.default_rng(seed).permutation(np.asarray(ids, dtype=np.int64))
        window = _WINDOW * batch_size
        windows = (shuffled[first : first + window] for first in range(0, len(shuffled), window))
        self._batches: BatchPlan | list[list[Row]]
        if row_tokens is None:
            self._batches = _in_windows(np.asarray(lengths, dtype=np.int64), windows, batch_tokens, batch_size)
        else:
            cut = (few_packed_batches(lengths, batch_tokens, row_tokens, batch_size, part) for part in windows)
            self._batches = [batch for batches in cut for batch in batches]

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the batches; Lightning calls this before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[BatchIds]:
        return iter(self.in_epoch(self.epoch))

    def in_epoch(self, epoch: int) -> Sequence[BatchIds]:
        """The batches in the order of an epoch."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self._batches))
        if isinstance(self._batches, BatchPlan):
            return self._batches.taken(order)
        return [self._batches[index] for index in order]


def _in_windows(
    lengths: Int[np.ndarray, " example"],
    windows: Iterable[Int[np.ndarray, " window"]],
    batch_tokens: int,
    batch_size: int,
) -> BatchPlan:
    """The batches of each window, cut by length."""
    orders, sizes = [np.zeros(0, np.int64)], list[int]()
    for window in windows:
        orders.append(longest_first(lengths, window))
        sizes += _sizes(lengths, orders[-1], batch_tokens, batch_size)
    return BatchPlan(np.concatenate(orders), np.array(sizes, dtype=np.int64))
