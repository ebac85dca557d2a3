"""Tensors that are not there yet: how to make them, or some rows of them, from others that are not.

A library works with them as with any tensors. What it does is noted down, and done when a tensor is read, to the rows
that are asked for. Casts and stacks need no other rows; for anything else whole tensors are made, one at a time.
"""

from collections.abc import Callable
from functools import partial
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

Rows = slice | EllipsisType
"""Some rows (of dimension 0), or all there is."""


class LazyTensor(Tensor):
    """A tensor that is not there yet.

    Args:
        like: One on the meta device, of its size and type.
        read: Makes it, or some rows of it.
        device: Where it says it is: on the host, or on the meta device to whoever is to know that it is not there.
    """

    read: Callable[[Rows], Tensor]
    get_shape: Callable[[], list[int]]
    get_dtype: Callable[[], str]

    @staticmethod
    def __new__(cls, like: Tensor, read: Callable[[Rows], Tensor], device: str = "cpu") -> "Described":
        """A tensor without memory."""
        kind: Any = {"dtype": like.dtype, "device": torch.device(device), "storage_size": like.numel() * like.itemsize}
        made: Any = torch.Tensor._make_wrapper_subclass(cls, like.shape, strides=like.stride(), **kind)
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
        device = next(leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, LazyTensor))
        if isinstance(likes, Tensor):
            return LazyTensor(likes, partial(_result, function, args, kwargs), device)
        return [LazyTensor(like, partial(_part, function, args, kwargs, k), device) for k, like in enumerate(likes)]


def rows_of(tensor: Tensor, rows: Rows) -> Tensor:
    """Rows of a tensor that may be one of these."""
    return tensor.read(rows) if isinstance(tensor, LazyTensor) else tensor[rows]


def _read(tree: Any) -> Any:
    return tree_map_only(LazyTensor, lambda tensor: tensor.read(...), tree)


def _like(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), tree)


_aten = torch.ops.aten
_ELEMENTWISE = {_aten.alias.default, _aten.clone.default, _aten.detach.default, _aten._to_copy.default}


def _result(function: Any, args: Any, kwargs: Any, rows: Rows) -> Tensor:
    """Rows of what a function gives, from no more rows of its arguments than it takes."""
    result: Tensor
    if function in _ELEMENTWISE:
        result = function(args[0].read(rows), *args[1:], **kwargs)
    elif function is _aten.stack.default and args[1:] in ((), (0,)) and rows is not ...:
        tensors = _read(args[0][rows])
        result = torch.stack(tensors) if tensors else torch.empty_like(function(_like(args[0]))[rows], device="cpu")
    elif function is _aten.cat.default and args[1:] and args[1] > 0:
        result = torch.cat([rows_of(tensor, rows) for tensor in args[0]], args[1])
    else:
        result = function(*_read(args), **_read(kwargs))[rows]
    return result


def _part(function: Any, args: Any, kwargs: Any, index: int, rows: Rows) -> Tensor:
    """Rows of one of the several results of a function."""
    result: Tensor = function(*_read(args), **_read(kwargs))[index][rows]
    return result
