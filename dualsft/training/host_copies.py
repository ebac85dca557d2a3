"""Copies between an accelerator and the host that neither waits for: through pinned memory, in the stream's order."""

import torch
from torch import Tensor


def copied_to_host(tensor: Tensor) -> Tensor:
    """Begin a copy to the host; it may be read once the device has been waited for."""
    return _pinned(tensor, tensor.dtype).copy_(tensor, non_blocking=True) if tensor.is_cuda else tensor.cpu()


def rounded_for(device: torch.device, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in a type, to be copied to a device: where that is an accelerator and they are not, in pinned memory."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(dtype)
    return _pinned(values, dtype).copy_(values)


def wait_for_copies() -> None:
    """Wait until every copy that was begun is complete, on whichever stream: shards have one of their own."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _pinned(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(like.shape, dtype=dtype, pin_memory=True)
