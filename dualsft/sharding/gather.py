"""Several full tensors from shards, by one all-gather for each type, beside which other work goes on."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from dualsft.sharding.shards import mesh_device


class Gathering:
    """An all-gather of shards that has been started; every rank must start and finish the same ones in one order.

    Args:
        shards: This rank's rows of each tensor, of one type.
        like: The parameters that are sharded in the same way, over one mesh.
    """

    @torch.no_grad()
    def __init__(self, shards: Sequence[Tensor], like: Sequence[DTensor]) -> None:
        mesh = like[0].device_mesh
        self._shapes, self._ranks = [part.shape for part in like], mesh.size()
        # of every rank as many rows as the first one has; the last ranks may have fewer
        self._lengths = [math.ceil(shape[0] / self._ranks) * math.prod(shape[1:]) for shape in self._shapes]
        self._own = torch.empty(sum(self._lengths), dtype=shards[0].dtype, device=mesh_device(like[0]))
        for room, shard in zip(self._own.split(self._lengths), shards, strict=True):
            room[: shard.numel()].copy_(shard.flatten(), non_blocking=True)
        self._all = self._own.new_empty(self._ranks * len(self._own))
        self._work = distributed.all_gather_into_tensor(self._all, self._own, group=mesh.get_group(), async_op=True)

    def tensors(self) -> list[Tensor]:
        """The full tensors, once they are there."""
        self._work.wait()
        parts = self._all.view(self._ranks, -1).split(self._lengths, 1)
        return [part.reshape(-1, *shape[1:])[: shape[0]] for part, shape in zip(parts, self._shapes, strict=True)]
