"""What the device has computed, read by the host in one copy: the host waits for the device at every one."""

from collections.abc import Sequence

import torch
from torch import Tensor


def read_together(values: Sequence[Tensor]) -> list[Tensor]:
    """These tensors of one device on the host, in float64."""
    flat = torch.cat([value.detach().double().flatten() for value in values]).cpu()
    parts = flat.split([value.numel() for value in values])
    return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]
