"""Lazy tensors: they record the operations applied to them, and compute rows of the result when these are read.

A library works with them as with any tensors. Casts and stacks compute only the rows that are read; any other operation
reads its arguments in full, one at a time.
"""

from collections.abc import Callable
from functools import partial
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

Rows = slice | EllipsisType
"""Rows (of dimension 0) of a tensor, or ``...`` for the full tensor."""


class LazyTensor(Tensor):
    """A tensor without memory, which is computed when it is read.

    Args:
        like: A tensor on the meta device, of the same shape and type.
        read: Computes the full tensor, or some rows of it.
        device: The device it reports: the host, or the meta device for a library that skips tensors without memory.
    """

    read: Callable[[Rows], Tensor]
    get_shape: Callable[[], list[int]]
    get_dtype: Callable[[], str]

    @staticmethod
    def __new__(cls, like: Tensor, read: Callable[[Rows], Tensor], device: str = "cpu") -> "LazyTensor":
        """Wrap the shape and type of the meta tensor."""
        options: Any = {"dtype": like.dtype, "device": torch.device(device), "storage_size": like.nbytes}
        wrapper: Any = torch.Tensor._make_wrapper_subclass(cls, like.shape, strides=like.stride(), **options)
        wrapper.read = read
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Record an operation that returns tensors; compute any other at once."""
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
    """Rows of a tensor, lazy or not."""
    return tensor.read(rows) if isinstance(tensor, LazyTensor) else tensor[rows]


def _read(tree: Any) -> Any:
    return tree_map_only(LazyTensor, lambda tensor: tensor.read(...), tree)


def _like(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), tree)


_aten = torch.ops.aten
_ELEMENTWISE = {_aten.alias.default, _aten.clone.default, _aten.detach.default, _aten._to_copy.default}


def _result(function: Any, args: Any, kwargs: Any, rows: Rows) -> Tensor:
    """Rows of a function's result, from as few rows of its arguments as it needs."""
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
    """Rows of one of a function's several results."""
    result: Tensor = function(*_read(args), **_read(kwargs))[index][rows]
    return result
