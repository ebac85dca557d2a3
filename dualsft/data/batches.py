"""Examples -> batches: padding, and which examples share a batch.

A batch of b rows whose longest has t tokens costs b·t tokens, padding included. Both ways of batching keep that within
a budget and keep padding low by putting examples of similar length together. Where examples are packed, a row holds
several of them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

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
) -> list[list[int]]:
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
    order = longest_first(lengths, range(len(lengths)) if ids is None else ids)
    batches: list[list[int]] = []
    first = 0
    while first < len(order):
        longest = int(lengths[order[first]])
        if longest > batch_tokens:
            raise UserError(
                f"Example {order[first]} has {longest} tokens, more than data.batch_tokens={batch_tokens}: "
                "raise data.batch_tokens or lower data.max_length."
            )
        fitting = batch_tokens // max(longest, 1)
        count = fitting if batch_size is None else min(fitting, batch_size)
        batches.append(order[first : first + count])
        first += count
    return batches


def padding_share(lengths: Lengths, batches: Iterable[BatchIds]) -> float:
    """Share of the batches' token slots (rows x fullest row) that hold padding; 0 without any batch."""
    slots = tokens = 0
    for batch in batches:
        rows = [sum(int(lengths[i]) for i in ([row] if isinstance(row, int) else row)) for row in batch]
        slots += len(rows) * max(rows)
        tokens += sum(rows)
    return 1 - tokens / slots if slots else 0.0


def tokens_in(lengths: Lengths, batches: Iterable[BatchIds]) -> int:
    """Tokens of the examples in some batches, without padding."""
    ids = [i for batch in batches for row in batch for i in ([row] if isinstance(row, int) else row)]
    return int(np.asarray(lengths, dtype=np.int64)[ids].sum()) if ids else 0


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
        self._batches: list[BatchIds] = []
        for first in range(0, len(shuffled), window):
            part = shuffled[first : first + window].tolist()
            if row_tokens is None:
                self._batches += length_batches(lengths, batch_tokens, batch_size, part)
            else:
                self._batches += few_packed_batches(lengths, batch_tokens, row_tokens, batch_size, part)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the batches; Lightning calls this before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[BatchIds]:
        return iter(self.in_epoch(self.epoch))

    def in_epoch(self, epoch: int) -> list[BatchIds]:
        """The batches in the order of an epoch."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self._batches))
        return [self._batches[index] for index in order]
