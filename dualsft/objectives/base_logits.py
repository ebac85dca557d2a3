"""The base model's logits that a batch of a prior term compares with, kept through the backward pass.

Of a large batch and vocabulary these are the largest tensor by far: 3.9 GiB in bfloat16 for 16,384 supervised tokens
and a vocabulary of 128,256. Those lie on the host, in pinned memory, and come to the device a chunk at a time.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from dualsft.data.layout import Batch
from dualsft.models import PreTrainedModel
from dualsft.objectives import chunks
from dualsft.objectives.supervised import Supervised


def is_on_host(size: int, device: str) -> bool:
    """Whether so many bytes of logits, which come from this type of device, are kept on the host."""
    return device != "cpu" and size > chunks.LARGEST


class BaseLogits:
    """The base model's logits that predict a batch's supervised tokens, in its own type.

    Args:
        teacher: The base model.
        batch: Padded or packed, on the model's device.
    """

    _kept: Float[Tensor, "supervised vocabulary"]

    @torch.no_grad()
    def __init__(self, teacher: PreTrainedModel, batch: Batch) -> None:
        supervised = Supervised.of(batch)
        self._count = len(supervised)
        chunks.supervised_values(teacher, batch, supervised, self._keep)

    def at(self, where: slice, device: torch.device) -> Float[Tensor, "chunk vocabulary"]:
        """The logits of some of the tokens, on a device."""
        return self._kept[where].to(device, non_blocking=True)

    def chunks(self, tokens: int) -> Iterator[slice]:
        """The places of so many tokens after another; one, of nothing, if there are none."""
        return (slice(first, first + tokens) for first in range(0, max(self._count, 1), tokens))

    def _keep(self, logits: Float[Tensor, "chunk vocabulary"], where: slice, _: object) -> Float[Tensor, " chunk"]:
        if not hasattr(self, "_kept"):
            self._kept = self._room(logits)
        self._kept[where].copy_(logits, non_blocking=True)
        return logits[:, 0].clone()  # a view would keep the chunk

    def _room(self, logits: Tensor) -> Tensor:
        shape, device = (self._count, logits.shape[1]), logits.device
        if not is_on_host(self._count * logits.shape[1] * logits.itemsize, device.type):
            return logits.new_empty(shape)
        return torch.empty(shape, dtype=logits.dtype, pin_memory=logits.is_cuda)
