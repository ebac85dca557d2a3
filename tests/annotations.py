"""beartype's checks of annotations, compiled once for each function in the source.

A function within another is defined anew whenever the outer one runs, and jaxtyping has its checks compiled anew: a
fifth of the time of a tiny selection. They depend on nothing but the names and the annotations of its arguments.
"""

from collections.abc import Callable, Hashable
from typing import Any

from beartype import beartype

_CHECKS: dict[Hashable, Callable[..., Any]] = {}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Stands for `beartype.beartype` in jaxtyping's import hook.

    Args:
        function: What jaxtyping makes to have arguments or a result checked: it has the names and annotations of the
            function that it checks for, and does nothing.
    """
    if "<locals>" not in function.__qualname__ or function.__defaults__ or function.__kwdefaults__:
        return beartype(function)
    key = (function.__module__, function.__qualname__, function.__code__, *function.__annotations__.items())
    if key not in _CHECKS:
        _CHECKS[key] = beartype(function)
    return _CHECKS[key]
