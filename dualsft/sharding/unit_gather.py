"""Tensors of the model's own shapes, such as directions, that travel with a sharded model's units.

Each is held in shards like the parameter of its name. While backward is in a unit, those of that unit are whole: they
are gathered as its output's gradient arrives, and dropped as the next unit's are. Those of the root, to which the
embeddings and the head belong, are whole until backward is over. A model that is not sharded has whole tensors already.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from dualsft.sharding.shards import full_tensor


class UnitGather:
    """Makes them whole in time, while the context is open.

    Args:
        model: Any module.
        tensors: Each by parameter name; for a sharded model the parameter's local shard.

    Attributes:
        whole: The same, each of its parameter's whole shape; to be asked for in backward alone.
    """

    def __init__(self, model: nn.Module, tensors: Sequence[Mapping[str, Tensor]]) -> None:
        self._model, self._tensors = model, tensors
        self._units = units(model)
        self._shards = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
        self._at_hand: list[dict[str, Tensor]] = [{} for _ in tensors]
        self._held: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []
        self.whole: Sequence[Mapping[str, Tensor]] = tensors
        if self._shards:
            self.whole = [_AtHand(of, found) for of, found in zip(tensors, self._at_hand, strict=True)]

    def __enter__(self) -> "Travelling":
        if self._shards and self._tensors:
            self._handles = [unit.register_forward_hook(self._expect) for unit in self._units]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.drop()

    def drop(self) -> None:
        """Backward is over."""
        for found in self._at_hand:
            found.clear()
        self._held = []

    def _expect(self, unit: nn.Module, _: Any, output: Any) -> None:
        for value in pytree.tree_leaves(output):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(lambda _: self._gather(unit))

    def _gather(self, unit: nn.Module) -> None:
        if unit in self._held:
            return
        around = [held for held in self._held if unit in set(held.modules())]
        for held in set(self._held) - set(around):
            self._forget(self._units[held])
        self._held = [*around, unit]
        for of, found in zip(self._tensors, self._at_hand, strict=True):
            found.update({name: full_tensor(of[name], self._shards[name]) for name in self._units[unit] if name in of})

    def _forget(self, names: Sequence[str]) -> None:
        for found in self._at_hand:
            for name in names:
                found.pop(name, None)


class _AtHand(Mapping[str, Tensor]):
    """One of the tensors by parameter name, as far as it is whole."""

    def __init__(self, names: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
        self._names, self._found = names, found

    def __getitem__(self, name: str) -> Tensor:
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def units(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The units of a sharded model, the root first, each with the names of its parameters; none if it is not."""
    found: dict[nn.Module, list[str]] = {m: [] for m in model.modules() if isinstance(m, FSDPModule)}
    owners = {path: module for path, module in model.named_modules() if module in found}
    for name, _ in model.named_parameters() if found else ():
        path = name.rpartition(".")[0]
        while path not in owners:
            path = path.rpartition(".")[0]
        found[owners[path]].append(name)
    return found


def unsharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that forward and backward work with, whose gradients are this rank's own.

    A unit of a sharded model puts them in the place of its shards while it is whole; they are the same objects each
    time. Of any other model they are its parameters.
    """
    shards = dict(model.named_parameters())
    found = dict(shards)
    for unit, names in units(model).items():
        if not isinstance(shards[names[0]], DTensor):  # it is whole
            continue
        assert isinstance(unit, FSDPModule)
        unit.unshard()
        here = dict(model.named_parameters())
        found.update({name: here[name] for name in names})
        unit.reshard()
    return found


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Every unit of a sharded model whole on every rank, and gradients each rank's own, while the context is open.

    The model then is like one that is not sharded, and takes as much memory.
    """
    here = [unit for unit in units(model) if isinstance(unit, FSDPModule)]
    for unit in here:
        _stay(unit, True)
        unit.unshard()
    try:
        yield
    finally:
        for unit in here:
            _stay(unit, False)
            unit.reshard()


def _stay(unit: FSDPModule, whole_too: bool) -> None:
    unit.set_reshard_after_forward(not whole_too, recurse=False)
    unit.set_reshard_after_backward(not whole_too, recurse=False)
    unit.set_requires_gradient_sync(not whole_too, recurse=False)
