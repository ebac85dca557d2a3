"""Checks of annotations as the tests run: in the modules that name shapes, compiled once for each function.

Elsewhere mypy checks them, and at run time they would cost half the time of a tiny selection.

A function within another is defined anew whenever the outer one runs, and jaxtyping has its checks compiled anew. They
depend on nothing but the names and the annotations of its arguments.
"""

from collections.abc import Callable, Hashable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from beartype import beartype
from jaxtyping import install_import_hook

_CHECKS: dict[Hashable, Callable[..., Any]] = {}


def check_annotations(package: str) -> None:
    """Has jaxtyping instrument the modules of a package that name shapes, when they are imported."""
    install_import_hook(modules_with_shapes(package), f"{__name__}.{checked.__name__}")


def modules_with_shapes(package: str) -> list[str]:
    """The modules of a package that import jaxtyping; nothing is imported."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    paths = (path for path in sorted(root.rglob("*.py")) if "from jaxtyping import" in path.read_text("utf-8"))
    return [".".join((package, *path.relative_to(root).with_suffix("").parts)) for path in paths]


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
