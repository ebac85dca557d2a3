"""A rank's shard of a tensor, and the whole: FSDP2 deals out a parameter's rows (`DTensor`, placement ``Shard(0)``).

A shard is contiguous in the row-major order of the whole tensor. With fewer rows than ranks some shards are empty.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dualsft.distributed.sharding import first_row, local


@torch.no_grad()
def whole(shard: Tensor, like: Tensor) -> Tensor:
    """The tensor whose shards the ranks have; every rank must ask at once.

    Args:
        shard: This rank's, of any type.
        like: The parameter that is sharded in the same way; if it is not sharded, the shard is the whole.
    """
    if not isinstance(like, DTensor):
        return shard
    spread = DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return spread.full_tensor()


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """The same in memory of its own, if the tensor is more than that."""
    return part(tensor, like).clone() if isinstance(like, DTensor) else tensor


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, sharing its memory.

    Args:
        tensor: The whole, which every rank has.
        like: The parameter that is sharded in the same way; if it is not sharded, the whole is the shard.
    """
    if not isinstance(like, DTensor):
        return tensor
    first = first_row(like)
    return tensor[first : first + len(local(like))]
