"""A batch dealt out: every rank has the whole batch, and works on its own rows of it.

So what is counted of a batch is counted without asking, and batches, their order and a run's place among them are what
they are on one process. A rank without a row stands in with one of the others' that counts for nothing, as all ranks
of a sharded model make the same calls.
"""

import torch

from dualsft.data.layout import Batch, Layout
from dualsft.sharding.collectives import rank_slice, world_size

_NONE = -100


def local_rows(batch: Batch) -> Batch:
    """This rank's rows, dealt out one by one, without the padding that they do not need.

    Args:
        batch: Padded or packed; the same on every rank.

    Returns:
        A batch of the same kind; without any label, if there are fewer rows than ranks and none is left for this one.
    """
    if world_size() == 1:
        return batch
    rows = list(range(len(batch["input_ids"])))
    own = rows[rank_slice()]
    part = _rows(batch, own or rows[-1:])
    return part if own else {**part, "labels": torch.full_like(part["labels"], _NONE)}


def _rows(batch: Batch, rows: list[int]) -> Batch:
    index = torch.tensor(rows, device=batch["input_ids"].device)
    if "spans" not in batch:
        return _trimmed({name: values[index] for name, values in batch.items()})
    spans = batch["spans"]
    inside = torch.isin(spans[:, 0], index)
    spans = torch.cat([torch.searchsorted(index, spans[inside, :1].contiguous()), spans[inside, 1:]], 1)
    tokens = {name: values[index] for name, values in batch.items() if name not in ("example_id", "spans")}
    return _trimmed({"example_id": batch["example_id"][inside], "spans": spans, **tokens})


def _trimmed(batch: Batch) -> Batch:
    width = max(first + length for _, first, length in Layout.of(batch).spans)
    wide = ("example_id", "spans")
    return {name: values if name in wide else values[:, :width] for name, values in batch.items()}
