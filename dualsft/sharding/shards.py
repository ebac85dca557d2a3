"""Local shards and full tensors: FSDP2 splits the rows of a parameter over the ranks (`DTensor`, ``Shard(0)``).

A local shard is contiguous in the row-major order of the full tensor. With fewer rows than ranks some shards are empty.
Where a function takes ``like``, it is the parameter that is sharded in the same way; if it is not sharded, shard and
full tensor are the same tensor, which is returned.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Replicate, Shard


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, in the same memory; a plain tensor itself.

    With gradients enabled it is part of the graph, as any view: detach a parameter first to modify it.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is sharded (a `DTensor`)."""
    return isinstance(tensor, DTensor)


def first_row(tensor: Tensor) -> int:
    """The index, along dimension 0 of the full tensor, of this rank's first row; the number of rows if it has none.

    Raises:
        ValueError: if the tensor is sharded along anything but dimension 0 and one mesh axis.
    """
    if not isinstance(tensor, DTensor):
        return 0
    if tuple(tensor.placements) != (Shard(0),):
        raise ValueError(f"only shards along dimension 0 are contiguous, not {tensor.placements}")
    return rows_of_rank(tensor.shape[0], tensor.device_mesh.get_local_rank(), tensor.device_mesh.size()).start


def rows_of_rank(rows: int, rank: int, ranks: int) -> range:
    """Which rows of a tensor a rank has: as many as any other, but for the last ranks that have some, and none."""
    size = math.ceil(rows / ranks)
    return range(min(rank * size, rows), min((rank + 1) * size, rows))


def shard_offset(tensor: Tensor) -> int:
    """The flat index, in the row-major full tensor, of this rank's first entry; raises as `first_row` does."""
    return first_row(tensor) * math.prod(tensor.shape[1:])


def compute_device(model: nn.Module) -> torch.device:
    """The device that a model computes on; its shards may be stored elsewhere."""
    parameter = next(model.parameters())
    return _mesh_device(parameter) if isinstance(parameter, DTensor) else parameter.device


def _mesh_device(sharded: DTensor) -> torch.device:
    kind = sharded.device_mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def from_local(shard: Tensor, like: Any) -> DTensor:
    """The sharded tensor of this rank's shard, of any type and on any device; ``like`` is a `DTensor`."""
    layout = {"device_mesh": like.device_mesh, "placements": like.placements, "run_check": False}
    return DTensor.from_local(shard, **layout, shape=like.shape, stride=like.stride())


def full_tensor(shard: Tensor, like: Tensor) -> Tensor:
    """The full tensor, all-gathered on the device that the model computes on; every rank must call this at once."""
    return finish_gather(begin_gather(shard, like))


@torch.no_grad()
def begin_gather(shard: Tensor, like: Tensor) -> Tensor:
    """Begin to all-gather a full tensor; `finish_gather` waits for it, on an accelerator beside other work.

    Every rank must begin the same ones in the same order. Shards of unequal length are there at once, as all are on a
    CPU: gloo damages the heap where a gather and another collective of FSDP2 go on together.
    """
    if not isinstance(like, DTensor):
        return shard
    part = from_local(shard.to(_mesh_device(like)), like)
    beside = part.device_mesh.device_type != "cpu"
    return part.redistribute(placements=[Replicate()], async_op=beside).to_local()


def finish_gather(begun: Tensor) -> Tensor:
    """The full tensor of `begin_gather`; the host does not wait for an accelerator."""
    return begun.wait() if isinstance(begun, AsyncCollectiveTensor) else begun


def shard_copy(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of this rank's shard of a full tensor, on the device that stores the model's shards."""
    return shard_of(tensor, like).to(like.device, copy=True) if isinstance(like, DTensor) else tensor


def shard_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a full tensor that every rank has, in the same memory."""
    if not isinstance(like, DTensor):
        return tensor
    first = first_row(like)
    return tensor[first : first + len(local_shard(like))]
