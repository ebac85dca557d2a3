"""Sums on the host of gradients that an accelerator computes: they cross the bus while backward goes on.

A gradient is copied in pieces to pinned memory, on a stream of its own, and a thread adds each piece that has arrived.
The device holds a gradient until it is copied, and no sum. There are few places for pieces: where all are taken,
backward is not launched any further, so that no more than these and one module's gradients are on their way.

Each sum is added up in the order of its gradients, in float32: its bits are those of a sum on the device, except that
a GPU may round a square and its addition together.
"""

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

PLACES = 8
"""How many pieces are on their way at a time."""
PIECE = 2**25
"""Bytes of a piece."""
_BLOCK = 2**20
"""Entries that are added at a time: larger ones leave the cache between their conversion and their addition."""


class HostSums:
    """Adds gradients on a device to sums on the host, while it is open.

    Args:
        sums: Parameter name -> a contiguous sum on the host; added to in place.
        squared: Whether to add the squares of the gradients' entries instead.
        device: Where the gradients are.
    """

    def __init__(self, sums: Mapping[str, Tensor], squared: bool, device: torch.device) -> None:
        self._sums, self._squared, self._device = sums, squared, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        size = min(PIECE, max((total.nbytes for total in sums.values()), default=0))
        self._places = deque(_Place(size, pinned=device.type == "cuda") for _ in range(PLACES))

    def __enter__(self) -> "HostSums":
        # a thread is on the first device until it is told, and what it does with events would open a context there
        settle = partial(torch.cuda.set_device, self._device) if self._device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "sums on the host", initializer=settle)
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def add(self, name: str, gradient: Tensor) -> None:
        """Begin to add a gradient; waits while all places are taken."""
        flat, total = gradient.detach().flatten(), self._sums[name].view(-1)
        length = self._places[0].size // flat.itemsize
        for piece, part in zip(flat.split(length), total.split(length), strict=True):
            self._places.rotate(-1)
            place = self._places[0]
            place.wait()
            values, arrived = place.begin(piece, self._stream)
            place.added = self._thread.submit(_add, part, values, arrived, self._squared)

    def complete(self) -> None:
        """Wait until all gradients have been added."""
        for place in self._places:
            place.wait()


class _Place:
    """Memory for a piece of a gradient on its way.

    Attributes:
        size: Its bytes.
        added: The addition of the latest piece.
    """

    def __init__(self, size: int, pinned: bool) -> None:
        self.size, self.added = size, Future[None]()
        self.added.set_result(None)
        self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)

    def wait(self) -> None:
        """Wait until the latest piece has been added; raises what went wrong with it."""
        self.added.result()

    def begin(self, piece: Tensor, stream: torch.cuda.Stream | None) -> tuple[Tensor, torch.cuda.Event | None]:
        """Begin to copy a piece; return where it will be, and the event that tells that it is there."""
        values = self._memory[: piece.nbytes].view(piece.dtype)
        if stream is None:
            values.copy_(piece)
            return values, None
        arrived = torch.cuda.Event(blocking=True)
        stream.wait_stream(torch.cuda.current_stream(piece.device))
        with torch.cuda.stream(stream):
            values.copy_(piece, non_blocking=True)
            arrived.record()
        piece.record_stream(stream)  # its memory is not used again before
        return values, arrived


def _add(total: Tensor, values: Tensor, arrived: Any, squared: bool) -> None:
    if arrived is not None:
        arrived.synchronize()
    for part, piece in zip(total.split(_BLOCK), values.split(_BLOCK), strict=True):
        if squared:
            part.addcmul_(wide := piece.to(part.dtype), wide)
        else:
            part.add_(piece)
