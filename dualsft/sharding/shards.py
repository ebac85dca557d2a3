"""A rank's shard of a tensor, and the whole: FSDP2 deals out a parameter's rows (`DTensor`, placement ``Shard(0)``).

A shard is contiguous in the row-major order of the whole tensor. With fewer rows than ranks some shards are empty.
"""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor in shards, in the same memory; a plain tensor itself.

    With gradients enabled it is part of the graph, as any view: detach a parameter first to modify it.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is in shards (a `DTensor`), of which this rank has one."""
    return isinstance(tensor, DTensor)


def first_row(tensor: Tensor) -> int:
    """The index, along dimension 0 of the whole tensor, of this rank's first row; its length if the rank has none.

    Raises:
        ValueError: if it is in shards along anything but dimension 0 and one axis of ranks.
    """
    if not isinstance(tensor, DTensor):
        return 0
    if tuple(tensor.placements) != (Shard(0),):
        raise ValueError(f"only shards along dimension 0 are contiguous, not {tensor.placements}")
    rows = tensor.shape[0]
    return min(tensor.device_mesh.get_local_rank() * math.ceil(rows / tensor.device_mesh.size()), rows)


def shard_offset(tensor: Tensor) -> int:
    """The flat index, in the whole tensor, of this rank's first entry: its rows are contiguous in row-major order.

    Raises:
        ValueError: if it is in shards along anything but dimension 0 and one axis of ranks.
    """
    return first_row(tensor) * math.prod(tensor.shape[1:])


def compute_device(model: nn.Module) -> torch.device:
    """Where the model computes, which may be elsewhere than its shards are kept."""
    parameter = next(model.parameters())
    return _device(parameter) if isinstance(parameter, DTensor) else parameter.device


def _device(sharded: DTensor) -> torch.device:
    kind = sharded.device_mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


@torch.no_grad()
def full_tensor(shard: Tensor, like: Tensor) -> Tensor:
    """The tensor whose shards the ranks have, where the model computes; every rank must ask at once.

    Args:
        shard: This rank's, of any type.
        like: The parameter that is sharded in the same way; if it is not sharded, the shard is the whole.
    """
    if not isinstance(like, DTensor):
        return shard
    spread = DTensor.from_local(
        shard.to(_device(like)),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return spread.full_tensor()


def shard_copy(tensor: Tensor, like: Tensor) -> Tensor:
    """The same where the shards are kept, in memory of its own, if the tensor is more than that."""
    return shard_of(tensor, like).to(like.device, copy=True) if isinstance(like, DTensor) else tensor


def shard_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, sharing its memory.

    Args:
        tensor: The whole, which every rank has.
        like: The parameter that is sharded in the same way; if it is not sharded, the whole is the shard.
    """
    if not isinstance(like, DTensor):
        return tensor
    first = first_row(like)
    return tensor[first : first + len(local_shard(like))]
