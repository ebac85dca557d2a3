"""Whether what trains all weights is held on the host: their float32 copies, gradients and Adam's moments."""

from typing import Literal

import torch
from torch import nn

from dualsft.models.dtypes import accumulator_dtype
from dualsft.runs.progress import say
from dualsft.sharding.collectives import any_rank
from dualsft.sharding.shards import compute_device, local_shard

Offload = Literal["auto", "always", "never"]
COPIES = 4
"""Tensors in the type of accumulators that a training holds of each weight: its copy, its gradient and two moments."""
SHARE = 0.75
"""Of the free memory of a device: if the tensors take more, too little is left for a batch."""


def is_too_large(size: float, free: float) -> bool:
    """Whether tensors of this many bytes are to be held on the host, with so many bytes free on the device."""
    return size > SHARE * free


def offloads(offload: Offload, model: nn.Module, what: str) -> bool:
    """Whether a training of all weights holds its tensors on the host, the same on all ranks; if auto says so, tell it.

    Args:
        offload: The option.
        model: The model, on its device.
        what: The training's name.
    """
    device = compute_device(model)
    if offload != "auto" or device.type != "cuda":
        return offload == "always"
    shards = [(local_shard(weight.detach()), accumulator_dtype(weight)) for weight in model.parameters()]
    size = COPIES * sum(shard.numel() * dtype.itemsize for shard, dtype in shards if shard.device.type != "cpu")
    if not any_rank(is_too_large(size, torch.cuda.mem_get_info(device)[0])):
        return False
    say(
        f"the {what} holds float32 weights, gradients and moments on the host ({size / 2**30:.0f} GiB), where they "
        "leave the device enough for a batch; model.offload_optimizer never would hold them on the device."
    )
    return True
