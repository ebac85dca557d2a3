"""Passes with ``meta`` as the accelerator and the CPU as the host: nothing has values, and devices must not mix."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PICKED = 3
"""How many entries every mask on the accelerator picks."""
_MOVES = {"copy_", "_to_copy"}


@contextmanager
def meta_as_accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run operations on meta tensors as on an accelerator's; fail at one on tensors of it and of the host.

    What the host reads are ones, so that all is finite and true.
    """
    enabled, autocast = torch.is_autocast_enabled, torch.autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": kind != "meta" and enabled(kind))

    def autocast_unless_meta(kind: str, *args: Any, **options: Any) -> Any:
        return nullcontext() if kind == "meta" else autocast(kind, *args, **options)

    monkeypatch.setattr(torch, "autocast", autocast_unless_meta)
    with _Meta():
        yield


class _Meta(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function._schema.name.split("::")[1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # a number on the host may be used on any device
        mixed = {t.device.type for t in tensors if t.dim()} == {"meta", "cpu"}
        assert name in _MOVES or not mixed, f"{function} on {[(t.device.type, tuple(t.shape)) for t in tensors]}"
        if any(t.is_meta for t in tensors):
            found = _of_values(name, args, kwargs)
            if found is not NotImplemented:
                return found
        return function(*args, **kwargs)


def _of_values(name: str, args: Any, kwargs: Any) -> Any:
    """What an operation gives whose result, or whose shape, depends on values; NotImplemented for any other."""
    first = args[0]
    if name == "_local_scalar_dense":
        return first.dtype == torch.bool or torch.ones((), dtype=first.dtype).item()
    if name == "_to_copy" and kwargs.get("device", first.device).type == "cpu":
        return torch.ones(first.shape, dtype=kwargs.get("dtype") or first.dtype)
    if name == "copy_" and not first.is_meta:
        return first.fill_(1)
    if name == "nonzero":
        return torch.zeros(_PICKED, first.dim(), dtype=torch.int64, device="meta")
    if name == "masked_select":
        return first.new_empty(_PICKED)
    if name.startswith(("index", "_index_put")) and len(args) > 1:
        masks = [i for i in tree_leaves(args[1]) if isinstance(i, Tensor) and i.dtype == torch.bool]
        if masks and name == "index":
            return first.new_empty(_PICKED, *first.shape[masks[0].dim() :])
        if masks:
            return first
    return NotImplemented
