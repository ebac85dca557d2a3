"""Checks of annotations as the tests run: of the functions that name shapes, compiled once for each of them.

Elsewhere mypy checks them, and at run time they would cost half the time of a tiny selection: two thirds of the calls
in modules that name shapes are of functions that do not.

A function within another is defined anew whenever the outer one runs, and jaxtyping has its checks compiled anew. They
depend on nothing but the names and the annotations of its arguments.
"""

from collections.abc import Callable, Hashable
from functools import partial
from importlib.util import find_spec
from inspect import isfunction
from pathlib import Path
from typing import Any, get_args

import jaxtyping
from beartype import beartype
from jaxtyping import AbstractArray, jaxtyped

_CHECKS: dict[Hashable, Callable[..., Any]] = {}


def check_annotations(package: str) -> None:
    """Has jaxtyping instrument the modules of a package that name shapes, when they are imported."""
    # what the import hook decorates every function with
    jaxtyping.jaxtyped = jaxtyped_with_shapes  # type: ignore[assignment]
    jaxtyping.install_import_hook(modules_with_shapes(package), f"{__name__}.{checked.__name__}")


def modules_with_shapes(package: str) -> list[str]:
    """The modules of a package that import jaxtyping; nothing is imported."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    paths = (path for path in sorted(root.rglob("*.py")) if "from jaxtyping import" in path.read_text("utf-8"))
    return [".".join((package, *path.relative_to(root).with_suffix("").parts)) for path in paths]


def jaxtyped_with_shapes(function: Any = None, **options: Any) -> Any:
    """jaxtyping's decorator, which leaves a function as it is that names no shape."""
    if function is None:
        return partial(jaxtyped_with_shapes, **options)
    if isfunction(function) and not any(map(names_shape, function.__annotations__.values())):
        return function
    return jaxtyped(function, **options)


def names_shape(annotation: Any) -> bool:
    """Whether a shape stands anywhere in an annotation; one that is written as a string may have one."""
    if isinstance(annotation, (str, list, tuple)):  # the arguments of a Callable are a list
        return isinstance(annotation, str) or any(map(names_shape, annotation))
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(map(names_shape, get_args(annotation)))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The type checker of jaxtyping's import hook.

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
