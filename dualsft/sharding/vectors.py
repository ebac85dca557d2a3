"""Vectors that are split over ranks: each holds one chunk, and the chunks in the order of ranks are the vector.

The ranks are those of one shard group, where others hold the same, or of another group. Chunks have any lengths. The
entries of a sharded tensor that a mask selects are such a vector: shards are contiguous.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from dualsft.sharding.collectives import all_gather, gather_shards
from dualsft.sharding.groups import RankGroup, rank, shard_group, world_size


def gather_vectors(chunks: Sequence[Tensor], group: RankGroup | None = None) -> list[Tensor]:
    """The full vectors, on rank zero's host alone; the other ranks get empty ones.

    Every rank must call this at once, with its chunk of each vector; in a single process the chunks are returned.

    Args:
        chunks: This rank's.
        group: The ranks that have a chunk each; those of a shard group if None.
    """
    if world_size() == 1:
        return list(chunks)
    group = group or shard_group()
    lengths = all_gather([len(chunk) for chunk in chunks], group)
    if rank():
        for chunk in filter(len, () if group.ranks[0] else chunks):
            distributed.send(chunk.detach().cpu().contiguous(), 0)
        return [torch.empty(0, dtype=chunk.dtype) for chunk in chunks]
    return [_receive(chunk, [of_rank[k] for of_rank in lengths]) for k, chunk in enumerate(chunks)]


def _receive(own: Tensor, lengths: list[int]) -> Tensor:
    """Rank zero's own chunk, followed by those that the other ranks send."""
    vector = torch.empty(sum(lengths), dtype=own.dtype)
    for source, chunk in enumerate(vector.split(lengths)):
        if source == 0:
            chunk.copy_(own.detach())
        elif len(chunk):
            distributed.recv(chunk, source)
    return vector


def split_vectors(vectors: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """Copies of this rank's chunks, of these lengths, of full vectors. Every rank must call this at once.

    Raises:
        ValueError: if a vector is not as long as its chunks together.
    """
    of_ranks = gather_shards(list(lengths))
    chunks = []
    for k, vector in enumerate(vectors):
        sizes = [of_rank[k] for of_rank in of_ranks]
        if len(vector) != sum(sizes):
            raise ValueError(f"a vector of {len(vector)} entries for pieces of {sum(sizes)} in all")
        chunks.append(vector.split(sizes)[shard_group().rank].clone())
    return chunks
