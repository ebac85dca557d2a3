"""An accelerator that this machine need not have: what it is asked to do, and what makes the host wait, on the CPU.

Every tensor is on the CPU. Those that an accelerator would hold are followed from the weights and the moved batches
through all that is computed from them, forward and backward.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_stack
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = {
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "masked_scatter_backward",
    "equal",
    "item",
    "unique_dim",
    "_unique2",
}
_COPIES = {Tensor.cpu, Tensor.tolist, Tensor.numpy}
_NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}


class HostWaits:
    """What the accelerator does, and what makes the host wait for it, while `counted` is open.

    Attributes:
        launches: Operation -> how often it worked on the accelerator's tensors; views of them are no work.
        waits: (file, operation) -> how often it waited there; the file is the innermost that is not torch's.
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self._held: dict[int, StorageWeakRef] = {}  # a weak reference keeps the number from being used again

    def place(self, tensors: Iterable[Tensor]) -> None:
        """Take tensors as the accelerator's."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._held[storage._cdata] = StorageWeakRef(storage)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is the accelerator's."""
        return tensor.untyped_storage()._cdata in self._held

    def moved(self, move: Callable[..., Any]) -> Callable[..., Any]:
        """A function that moves a batch to the accelerator, in place of one that has nothing to move."""

        def moved(batch: Any, *arguments: Any) -> Any:
            placed = move(batch, *arguments)
            for name, values in placed.items():
                placed[name] = values.clone()
            self.place(placed.values())
            return placed

        return moved

    def note(self, operation: str) -> None:
        """Count a wait of whoever calls."""
        files = (Path(frame.f_code.co_filename) for frame, _ in walk_stack(None))
        self.waits[
            next(f.name for f in files if "torch" not in f.parts and f.name != Path(__file__).name), operation
        ] += 1

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what happens while the context is open."""
        with _Copies(self), _Reads(self):
            yield


class _Reads(TorchDispatchMode):
    """Follows the accelerator's tensors, and counts the operations whose results the host must see to go on."""

    def __init__(self, seen: HostWaits) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(map(self._seen.holds, tensors)):
            name = function._schema.name.split("::")[1]
            if not function.is_view and name not in _NO_LAUNCH:
                self._seen.launches[name] += 1
            indices = tree_leaves(args[1]) if name.startswith("index") and len(args) > 1 else []
            if name in _READS or any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices):
                self._seen.note(name)
            changed = tensors if function._schema.is_mutable else []
            self._seen.place(leaf for leaf in (*tree_leaves(found), *changed) if isinstance(leaf, Tensor))
        return found


class _Copies(TorchFunctionMode):
    """Counts copies to the host, for which no operation is dispatched on a CPU; the copies are the host's."""

    def __init__(self, seen: HostWaits) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _COPIES and self._seen.holds(args[0]):
            self._seen.note(function.__name__)
            with torch._C.DisableTorchFunction():
                copy = torch.from_numpy(args[0].detach().float().numpy().copy()).to(args[0].dtype)
                return function(copy, *args[1:], **(kwargs or {}))
        return function(*args, **(kwargs or {}))
