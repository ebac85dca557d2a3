"""Batches that are dealt among ranks: each reads and collates its own rows, and knows what the whole batch holds.

What is known of a whole batch comes from the lengths and counts of its examples, without reading them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Int
from torch.utils.data import Dataset

from dualsft.data.batches import BatchIds
from dualsft.data.layout import Batch, num_tokens, on_host, unlabelled
from dualsft.data.supervision import IGNORED


@dataclass(frozen=True)
class Extent:
    """What a batch holds, on all ranks together.

    Attributes:
        ids: Its examples, in order.
        supervised: Supervised tokens.
        tokens: Tokens without padding.
    """

    ids: list[int]
    supervised: int
    tokens: int


class DealtBatch(Batch):
    """A rank's rows of a batch.

    A rank for which no row is left has the last one without labels, as all ranks of a sharded model make the same
    calls.

    Attributes:
        rows: The ids of the whole batch, row by row.
        extent: What the whole batch holds.
    """

    def __init__(self, own: Batch, rows: BatchIds, extent: Extent) -> None:
        super().__init__(own)
        self.rows, self.extent = rows, extent


def extent_of(batch: Batch) -> Extent:
    """What a batch holds; of one that is dealt, on all ranks together."""
    batch = on_host(batch)
    if isinstance(batch, DealtBatch):
        return batch.extent
    supervised = int((batch["labels"] != IGNORED).sum())
    return Extent(batch["example_id"].tolist(), supervised, num_tokens(batch))


@dataclass(frozen=True)
class Deal:
    """Which rows of each batch this process takes, and what is known of all examples.

    Attributes:
        part: The rows, as a slice of a batch's.
        lengths: Tokens of every example.
        num_tokens: Supervised tokens of every example.
    """

    part: slice
    lengths: Int[np.ndarray, " example"]
    num_tokens: Int[np.ndarray, " example"]


class DealtRowLists(Dataset[Any]):
    """Gives this process's rows of a batch for the ids of all its rows.

    Args:
        rows: Gives the rows of some ids.
        deal: Which are this process's.
    """

    def __init__(self, rows: Dataset[list[Any]], deal: Deal) -> None:
        self._rows, self._deal = rows, deal

    def __getitem__(self, ids: BatchIds) -> tuple[list[Any], bool, BatchIds, Extent]:
        """The rows, whether they are to be learnt, and the whole batch's ids and extent."""
        own = ids[self._deal.part]
        flat = list(chain.from_iterable(row if isinstance(row, list) else [row] for row in ids))
        supervised, tokens = (int(of[flat].sum()) for of in (self._deal.num_tokens, self._deal.lengths))
        return self._rows[own or ids[-1:]], bool(own), ids, Extent(flat, supervised, tokens)


def collate_dealt(found: tuple[Sequence[Any], bool, BatchIds, Extent], collate: Callable[[Any], Any]) -> DealtBatch:
    """Collates what `DealtRowLists` gives."""
    rows, is_own, ids, extent = found
    own = collate(rows)
    return DealtBatch(own if is_own else unlabelled(own), ids, extent)


def dealt(options: dict[str, Any], deal: Deal | None) -> dict[str, Any]:
    """The arguments of a `DataLoader` of whole batches, for this process's rows of them where batches are dealt."""
    if deal is None:
        return options
    collate = partial(collate_dealt, collate=options["collate_fn"])
    return {**options, "dataset": DealtRowLists(options["dataset"], deal), "collate_fn": collate}
