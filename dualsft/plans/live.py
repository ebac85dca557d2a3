"""The bytes of all tensors that are alive, while a computation runs on fake tensors: shapes, and no values.

The bytes are those of the storages, so that views count once. What an allocator rounds up or leaves unused between
tensors, and what libraries take inside an operation, does not show.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass
class Peak:
    """The most that was alive at a time.

    Attributes:
        size: Bytes.
        logits: Bytes of it in tensors whose last axis is the vocabulary.
    """

    size: int = 0
    logits: int = 0


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of living storages, and the floating-point operations, of everything in its context.

    Args:
        vocabulary: Length of the last axis of logits.

    Attributes:
        now: Bytes alive.
        peaks: Of the part since `restart` and of each after a `mark`.
        flops: Operations of matrix products and attention since `restart`; a multiplication and an addition are two.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self._sizes: dict[int, tuple[int, int]] = {}
        self.now = self._logits = self.flops = 0
        self.peaks: list[Peak] = []
        self.restart()

    def restart(self) -> None:
        """Forget peaks and operations so far."""
        self.peaks, self.flops = [], 0
        self.mark()

    def mark(self) -> None:
        """Begin another part, with a peak of its own."""
        self.peaks.append(Peak(self.now, self._logits))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count what it made."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=result)
        self.add(tree_leaves(result))
        return result

    def add(self, values: Iterable[Any]) -> None:
        """Count the storages of these tensors that are not counted yet."""
        for value in values:
            if isinstance(value, Tensor) and (key := (storage := value.untyped_storage())._cdata) not in self._sizes:
                size = storage.nbytes()
                wide = size if value.dim() and value.shape[-1] == self._vocabulary else 0
                self._sizes[key] = (size, wide)
                weakref.finalize(storage, self._forget, key)
                self.now, self._logits = self.now + size, self._logits + wide
                if self.now > self.peaks[-1].size:
                    self.peaks[-1] = Peak(self.now, self._logits)

    def _forget(self, key: int) -> None:
        size, wide = self._sizes.pop(key)
        self.now, self._logits = self.now - size, self._logits - wide
