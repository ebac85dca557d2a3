"""What is held on the host where the device has no room: a training of all weights, and a pass's sums of gradients.

A training holds float32 copies, gradients and Adam's moments of all weights, a pass one float32 sum.
"""

from collections.abc import Iterable
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


def offloads_training(offload: Offload, model: nn.Module, what: str) -> bool:
    """Whether a training of all weights holds its tensors on the host, the same on all ranks; if auto says so, tell it.

    Args:
        offload: The option.
        model: The model, on its device.
        what: The training's name.
    """
    if offload != "auto":
        return offload == "always"
    size = COPIES * _sum_size(model.parameters())
    if not _is_too_large_here(size, model):
        return False
    say(
        f"the {what} holds float32 weights, gradients and moments on the host ({size / 2**30:.0f} GiB), where they "
        "leave the device enough for a batch; model.offload_optimizer never would hold them on the device."
    )
    return True


def offloads_sums(offload: Offload, model: nn.Module, what: str, is_short: bool = False) -> bool:
    """Whether a pass holds its sums of gradients on the host, the same on all ranks; if auto says so, tell it.

    Shards that are stored on the host have their sums there anyway.

    Args:
        offload: The option.
        model: The model, on its device, on which all else is that the pass holds.
        what: The pass's name.
        is_short: Whether the device's memory has run out before.
    """
    size = _sum_size(weight for weight in model.parameters() if weight.requires_grad)
    if offload == "never" or not any_rank(size > 0):  # one with few rows may have none of a weight that is scored
        return False
    if offload == "always":
        return True
    if not _is_too_large_here(size, model, is_short):
        return False
    say(
        f"in the {what} gradients are added up on the host ({size / 2**30:.0f} GiB), where their sums leave the device "
        "enough for a batch; model.offload_sums never would hold them on the device."
    )
    return True


def _sum_size(weights: Iterable[nn.Parameter]) -> int:
    """The bytes of a sum of this rank's shards that are on an accelerator."""
    shards = [local_shard(weight.detach()) for weight in weights]
    return sum(s.numel() * accumulator_dtype(s).itemsize for s in shards if s.device.type != "cpu")


def _is_too_large_here(size: int, model: nn.Module, is_short: bool = False) -> bool:
    device = compute_device(model)
    return device.type == "cuda" and any_rank(is_short or is_too_large(size, _free(device)))


def _free(device: torch.device) -> int:
    """The bytes of a GPU that tensors can take: those that no process has, and those that torch keeps for its own."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
