"""Tensors of the parameters' shapes, such as directions, that are gathered together with a sharded model's units.

Each tensor is stored in shards like the parameter of its name. As the gradient of a unit's output arrives in backward,
the unit's tensors are there, and those of the unit before are dropped. They have been on their way since backward came
to that one: in what order it comes to the units is known from the first backward pass. The tensors of the root unit, to
which the embeddings and the head belong, are kept until backward is over. A model that is not sharded needs no
gathering.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from dualsft.models.lazy import LazyTensors
from dualsft.sharding.shards import begin_gather, finish_gather


class UnitGather:
    """Gathers tensors unit by unit in backward, while the context is open.

    Args:
        model: Any module.
        tensors: Mappings from parameter names to tensors; for a sharded model, to this rank's shards of them.

    Attributes:
        full_tensors: The same mappings with full tensors; to be read only in the backward of the unit that owns them.
    """

    def __init__(self, model: nn.Module, tensors: Sequence[Mapping[str, Tensor]]) -> None:
        self._tensors = tensors
        self._units = units(model)
        self._shards = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
        self._gathered: list[dict[str, Tensor]] = [{} for _ in tensors]
        self._open_units: list[nn.Module] = []
        self._latest: nn.Module | None = None
        self._next: dict[nn.Module, nn.Module] = {}  # unit -> the one that backward comes to after it
        self._begun: dict[nn.Module, list[dict[str, Tensor]]] = {}
        self._handles: list[RemovableHandle] = []
        self.full_tensors: Sequence[Mapping[str, Tensor]] = tensors
        if self._shards:
            pairs = zip(tensors, self._gathered, strict=True)
            self.full_tensors = [LazyTensors(shards, gathered.__getitem__) for shards, gathered in pairs]

    def __enter__(self) -> "UnitGather":
        if self._shards and self._tensors:
            self._handles = [unit.register_forward_hook(self._gather_in_backward) for unit in self._units]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.drop()

    def drop(self) -> None:
        """Drop all full tensors, once backward is over."""
        for gathered in self._gathered:
            gathered.clear()
        for parts in self._begun.values():  # of a backward pass that an error has ended
            _finish(parts)
        self._begun, self._open_units, self._latest = {}, [], None

    def _gather_in_backward(self, unit: nn.Module, _: Any, output: Any) -> None:
        for value in pytree.tree_leaves(output):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(lambda _: self._gather(unit))

    def _gather(self, unit: nn.Module) -> None:
        if unit in self._open_units:  # a unit may have several outputs
            return
        # backward is through with the open units, except those around this one
        outer = [other for other in self._open_units if unit in set(other.modules())]
        for closed in set(self._open_units) - set(outer):
            for gathered in self._gathered:
                for name in self._units[closed]:
                    gathered.pop(name, None)
        self._open_units = [*outer, unit]
        parts = self._begun.pop(unit, None) or self._begin(unit)
        if self._latest is not None:
            self._next[self._latest] = unit
        self._latest = unit
        if (following := self._next.get(unit)) is not None and following not in self._begun:
            self._begun[following] = self._begin(following)
        for gathered, part in zip(self._gathered, _finish(parts), strict=True):
            gathered.update(part)

    def _begin(self, unit: nn.Module) -> list[dict[str, Tensor]]:
        """Begin to gather a unit's tensors, of each mapping."""
        return [
            {name: begin_gather(shards[name], self._shards[name]) for name in self._units[unit] if name in shards}
            for shards in self._tensors
        ]


def _finish(parts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: finish_gather(begun) for name, begun in part.items()} for part in parts]


def units(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The units of a sharded model, the root first, with the names of their parameters; none of any other model."""
    found: dict[nn.Module, list[str]] = {m: [] for m in model.modules() if isinstance(m, FSDPModule)}
    owners = {path: module for path, module in model.named_modules() if module in found}
    for name, _ in model.named_parameters() if found else ():
        path = name.rpartition(".")[0]
        while path not in owners:
            path = path.rpartition(".")[0]
        found[owners[path]].append(name)
    return found


def unsharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that forward and backward compute with, whose gradients are this rank's own.

    While a unit of a sharded model is gathered, they replace its shards; they are the same objects each time. Of any
    other model they are its parameters.
    """
    shards = dict(model.named_parameters())
    found = dict(shards)
    for unit, names in units(model).items():
        if not isinstance(shards[names[0]], DTensor):  # it is gathered already
            continue
        assert isinstance(unit, FSDPModule)
        unit.unshard()
        gathered = dict(model.named_parameters())
        found.update({name: gathered[name] for name in names})
        unit.reshard()
    return found


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Keep every unit of a sharded model gathered, with gradients each rank's own, while the context is open.

    The model then behaves like one that is not sharded, and takes as much memory.
    """
    fsdp_units = [unit for unit in units(model) if isinstance(unit, FSDPModule)]
    for unit in fsdp_units:
        _reshard_after_use(unit, False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in fsdp_units:
            _reshard_after_use(unit, True)
            unit.reshard()


def _reshard_after_use(unit: FSDPModule, reshard: bool) -> None:
    unit.set_reshard_after_forward(reshard, recurse=False)
    unit.set_reshard_after_backward(reshard, recurse=False)
    unit.set_requires_gradient_sync(reshard, recurse=False)
