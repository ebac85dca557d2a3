"""Data parallelism within a batch: each rank works on its own rows, which it reads alone where the loader deals them.

It knows what the whole batch holds (`dualsft.data.dealing`), so that counts over a batch need no communication, and the
order of the batches is that of a single process.
"""

from dualsft.data.dealing import DealtBatch
from dualsft.data.layout import Batch, Layout, on_host, select_rows, to_device, unlabelled
from dualsft.sharding.groups import rank_slice, world_size


def rows_to_read() -> slice | None:
    """Which rows of a training or validation batch this rank reads; None, all, for a single process."""
    return rank_slice() if world_size() > 1 else None


def local_rows(batch: Batch) -> Batch:
    """This rank's rows of a padded or packed batch, every world-size-th one, without padding that none of them needs.

    A rank for which no row is left gets the last one without labels, as all ranks of a sharded model make the same
    calls. A batch that is dealt has this rank's rows alone.
    """
    if world_size() == 1 or isinstance(on_host(batch), DealtBatch):
        return batch
    device, batch = batch["input_ids"].device, on_host(batch)
    all_rows = range(len(batch["input_ids"]))
    own = all_rows[rank_slice()]
    rows = own or all_rows[-1:]
    width = max((first + length for row, first, length in Layout.of(batch).spans if row in rows), default=1)
    part = select_rows(batch, rows, slice(width))
    return to_device(part if own else unlabelled(part), device)
