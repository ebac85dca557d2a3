"""Vectors in pieces: each rank has one, of any length, and one behind another in the order of ranks they are whole.

The entries of a tensor that some mask chooses are such a vector where the tensor is in shards, as these are contiguous.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from dualsft.sharding.collectives import all_gather, rank, world_size


def gather_vectors(pieces: Sequence[Tensor]) -> list[Tensor]:
    """The whole vectors, on the host of the first rank alone; the others get empty ones. Every rank must ask at once.

    Args:
        pieces: This rank's piece of each; a single process has the wholes, and gets them back.
    """
    if world_size() == 1:
        return list(pieces)
    lengths = all_gather([len(piece) for piece in pieces])
    if rank():
        for piece in filter(len, pieces):
            distributed.send(piece.detach().cpu().contiguous(), 0)
        return [torch.empty(0, dtype=piece.dtype) for piece in pieces]
    return [_received(piece, [of_rank[k] for of_rank in lengths]) for k, piece in enumerate(pieces)]


def _received(piece: Tensor, lengths: list[int]) -> Tensor:
    """The first rank's piece, and behind it the others', which they send."""
    whole = torch.empty(sum(lengths), dtype=piece.dtype)
    for source, part in enumerate(whole.split(lengths)):
        if source == 0:
            part.copy_(piece.detach())
        elif len(part):
            distributed.recv(part, source)
    return whole


def split_vectors(wholes: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """This rank's pieces of vectors that every rank has, as copies. Every rank must ask at once.

    Args:
        wholes: The vectors.
        lengths: How long this rank's piece of each is.

    Raises:
        ValueError: if a vector is not as long as its pieces.
    """
    of_ranks = all_gather(list(lengths))
    found = []
    for k, whole in enumerate(wholes):
        parts = [of_rank[k] for of_rank in of_ranks]
        if len(whole) != sum(parts):
            raise ValueError(f"a vector of {len(whole)} entries for pieces of {sum(parts)} in all")
        found.append(whole.split(parts)[rank()].clone())
    return found
