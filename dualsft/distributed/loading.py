"""Loading a model so that each rank reads and holds its own rows of the weights alone.

The model is loaded as ever, but from files whose tensors are only described. What the loader does to them (it
renames, casts, stacks the experts of a layer into one tensor) is noted down, and done in the end to the rows that
this rank keeps. Casts and stacks need no other rows; for anything else one whole tensor is made at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, modeling_utils

from dualsft.distributed.sharding import first_row, local, shard_model
from dualsft.errors import UserError
from dualsft.models import Dtype, load_model, model_folder, reading_weights

_T = TypeVar("_T")
_Rows = slice | EllipsisType
"""Some rows (of dimension 0), or all there is."""


def load_sharded(
    name_or_path: str, mesh: DeviceMesh, dtype: Dtype = "auto", cpu_offload: bool = False
) -> PreTrainedModel:
    """The model of `load_model` in the shards of `shard_model`, without any rank ever holding all of it.

    Args:
        name_or_path: A Hugging Face model folder or hub id.
        mesh: All ranks along one axis; each of them calls this.
        dtype: Type to store the weights in; ``auto`` keeps the checkpoint's.
        cpu_offload: Keep shards and their gradients on the host.

    Raises:
        UserError: on every rank alike, as `load_model` and `shard_model` do.
    """
    folder = _on_all(mesh, lambda: model_folder(name_or_path))
    model, weights = _on_all(mesh, lambda: _described(folder, dtype))
    shard_model(model, mesh, cpu_offload)
    device = torch.device("cpu" if cpu_offload else mesh.device_type)
    _on_all(mesh, lambda: _fill(model, weights, device, folder))
    return model


def _on_all(mesh: DeviceMesh, action: Callable[[], _T]) -> _T:
    """What an action gives here, or the error of the first rank that it fails on."""
    result: Any = None
    message = ""
    try:
        result = action()
    except UserError as error:
        message = str(error)
    messages = [""] * mesh.size()
    distributed.all_gather_object(messages, message, group=mesh.get_group())
    if failures := [told for told in messages if told]:
        raise UserError(failures[0])
    return result


def _described(folder: Path, dtype: Dtype) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model whose parameters are on the meta device, and what would fill them."""
    with _described_files():
        model = load_model(str(folder), dtype)
    with reading_weights(folder):
        _read_buffers(model)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    empty = {id(p): torch.empty(p.shape, dtype=p.dtype, device="meta") for p in model.parameters()}
    _replace(model, {key: nn.Parameter(tensor) for key, tensor in empty.items()})
    return model, weights


@contextmanager
def _described_files() -> Iterator[None]:
    """Whatever `transformers` loads comes from files whose tensors are only described."""
    module: Any = modeling_utils
    module.safe_open, opened = _DescribedFile, module.safe_open
    try:
        yield
    finally:
        module.safe_open = opened


def _read_buffers(model: nn.Module) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if isinstance(buffer, _Described):
                module._buffers[name] = buffer.read(...)


def _replace(model: nn.Module, replacements: Mapping[int, nn.Parameter]) -> None:
    """Puts other parameters in the place of those of these ids, wherever they are used."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = replacements[id(parameter)]


def _fill(model: nn.Module, weights: dict[str, Tensor], device: torch.device, folder: Path) -> None:
    filled = {}
    with reading_weights(folder):
        for name, parameter in model.named_parameters():
            filled[id(parameter)] = _filled(parameter, weights.pop(name), device)
    _replace(model, filled)
    model._apply(lambda tensor: tensor)  # has each unit pad its shards to one size now, not in its first pass


def _filled(parameter: nn.Parameter, source: Tensor, device: torch.device) -> nn.Parameter:
    start, here = first_row(parameter), local(parameter.detach())
    rows = slice(start, start + len(here))
    shard = torch.empty(here.shape, dtype=here.dtype, device=device)
    shard.copy_(_rows_of(source, rows))
    whole: Any = parameter
    layout = {"device_mesh": whole.device_mesh, "placements": whole.placements, "run_check": False}
    return nn.Parameter(DTensor.from_local(shard, **layout, shape=whole.shape, stride=whole.stride()))


class _DescribedFile:
    """A safetensors file, as `safe_open` gives it, whose tensors are only described."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._file = safe_open(*args, **options)

    def __enter__(self) -> "_DescribedFile":
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves it open for what is read from it later."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_slice(self, name: str) -> "_Described":
        """A tensor that is still in the file."""
        stored = self._file.get_slice(name)
        shape = stored.get_shape()
        dtype = stored[0:0].dtype if shape else stored[...].dtype
        described = _Described(torch.empty(shape, dtype=dtype, device="meta"), lambda rows: stored[rows])
        described.get_shape, described.get_dtype = stored.get_shape, stored.get_dtype
        return described


class _Described(Tensor):
    """A tensor on the host that is not there yet: how to make it, or some rows of it, from others that are not."""

    read: Callable[[_Rows], Tensor]
    get_shape: Callable[[], list[int]]
    get_dtype: Callable[[], str]

    @staticmethod
    def __new__(cls, like: Tensor, read: Callable[[_Rows], Tensor]) -> "_Described":
        """Of the size and type of a tensor on the meta device."""
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=torch.device("cpu")
        )
        made.read = read
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Notes down what is done to it, unless the answer is not a tensor."""
        kwargs = kwargs or {}
        if function._schema.is_mutable:
            raise NotImplementedError(f"its weights are changed in place ({function})")
        if not any("Tensor" in str(returned.type) for returned in function._schema.returns):
            return function(*_read(args), **_read(kwargs))
        on_meta = {**kwargs, "device": torch.device("meta")} if "device" in kwargs else kwargs
        likes = function(*_like(args), **_like(on_meta))
        if isinstance(likes, Tensor):
            return _Described(likes, partial(_result, function, args, kwargs))
        return [_Described(like, partial(_part, function, args, kwargs, k)) for k, like in enumerate(likes)]


def _rows_of(tensor: Tensor, rows: _Rows) -> Tensor:
    return tensor.read(rows) if isinstance(tensor, _Described) else tensor[rows]


def _read(tree: Any) -> Any:
    return tree_map_only(_Described, lambda tensor: tensor.read(...), tree)


def _like(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), tree)


_aten = torch.ops.aten
_ELEMENTWISE = {_aten.alias.default, _aten.clone.default, _aten.detach.default, _aten._to_copy.default}


def _result(function: Any, args: Any, kwargs: Any, rows: _Rows) -> Tensor:
    """Rows of what a function gives, from no more rows of its arguments than it takes."""
    result: Tensor
    if function in _ELEMENTWISE:
        result = function(args[0].read(rows), *args[1:], **kwargs)
    elif function is _aten.stack.default and args[1:] in ((), (0,)) and rows is not ...:
        tensors = _read(args[0][rows])
        result = torch.stack(tensors) if tensors else torch.empty_like(function(_like(args[0]))[rows], device="cpu")
    elif function is _aten.cat.default and args[1:] and args[1] > 0:
        result = torch.cat([_rows_of(tensor, rows) for tensor in args[0]], args[1])
    else:
        result = function(*_read(args), **_read(kwargs))[rows]
    return result


def _part(function: Any, args: Any, kwargs: Any, index: int, rows: _Rows) -> Tensor:
    """Rows of one of the several results of a function."""
    result: Tensor = function(*_read(args), **_read(kwargs))[index][rows]
    return result
