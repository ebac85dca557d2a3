"""Names for scorers, paths and allocators: entry points, built-in ones included. Only named classes are imported."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pkgutil import resolve_name

from dualsft.errors import UserError, raised_at

GROUPS = {
    "dualsft.scorers": "dualsft.scorers:Scorer",
    "dualsft.paths": "dualsft.paths:ScoringPath",
    "dualsft.parameter_allocators": "dualsft.allocators:ParameterAllocator",
    "dualsft.data_allocators": "dualsft.allocators:DataAllocator",
}
"""Entry-point group -> the abstract class of what is registered there."""
OURS = "dualsft"
_NAME, _TARGET = re.compile(r"[\w-]+"), re.compile(r"[\w.]+:\w+(\.\w+)*\s*(\[.*\])?")


@dataclass(frozen=True)
class Registered:
    """One registered name, for `dualsft plugins`.

    Attributes:
        package: The distribution that has it, with its version.
        target: ``module:Class``.
        description: First line of the class's docstring; empty if it failed to load.
        problem: Why it cannot be used; empty if it can.
    """

    group: str
    name: str
    package: str
    target: str
    description: str
    problem: str


def class_path(group: str, name: str) -> str:
    """The import path of a registered class, or of one given by a dotted path; either is imported.

    Raises:
        UserError: if nothing has this name, two packages claim it, or the class cannot be used.
    """
    if "." in name:
        module, _, attribute = name.rpartition(".")
        _, problem = _examine(group, EntryPoint("class_path", f"{module}:{attribute}", group))
        if problem:
            raise UserError(f"{name} cannot be used in {group}: {problem}; mend it, or give a registered name.")
        return name
    candidates = list(entry_points(group=group, name=name))
    if not candidates:
        known = sorted({point.name for point in entry_points(group=group)})
        meant = "".join(f" (did you mean {near}?)" for near in get_close_matches(name, known, n=1))
        raise UserError(
            f"{name!r} is not registered in {group}{meant}; known names: {', '.join(known)}; or give a class_path."
        )
    ours = [point for point in candidates if _package(point) == OURS]
    if not ours and len({point.value for point in candidates}) > 1:
        owners = " and ".join(sorted({_label(point) for point in candidates}))
        raise UserError(f"{name!r} in {group} is claimed by {owners}; uninstall one, or give a class_path.")
    chosen = (ours or candidates)[0]
    _, problem = _examine(group, chosen)
    if problem:
        raise UserError(f"{name!r} in {group} cannot be used: {problem}; mend {_label(chosen)}, or give a class_path.")
    return f"{chosen.module}.{chosen.attr}"


def registered_name(group: str, path: str) -> str:
    """The name under which the class of an import path is registered; the class's own name if it is not."""
    name = path.rpartition(".")[2]
    alike = [point for point in entry_points(group=group) if point.attr == name]
    return next((point.name for point in alike if point.load() is resolve_name(path)), name)


def registered() -> Iterator[Registered]:
    """All registered names, in order, with the problem of each that failed to load."""
    for group in GROUPS:
        points = sorted(entry_points(group=group), key=lambda p: (p.name, _package(p) != OURS, _label(p)))
        for point in points:
            description, problem = _examine(group, point)
            others = sorted({_label(p) for p in points if p.name == point.name} - {_label(point)})
            if others and _package(point) != OURS:
                problem = problem or f"the name is also claimed by {', '.join(others)}"
            yield Registered(group, point.name, _label(point), point.value, description, problem)


def _examine(group: str, point: EntryPoint) -> tuple[str, str]:
    """The first line of the class's docstring, or why the class cannot be used; the other is empty."""
    if not _NAME.fullmatch(point.name):
        return "", f"the name {point.name!r} has other characters than letters, digits, _ and -"
    if not _TARGET.fullmatch(point.value):
        return "", f"{point.value!r} is not module:Class"
    try:
        found = point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin's import may raise anything, and must not break the list
        return "", f"{type(error).__name__}: {error}{raised_at(error, point.module)}"
    base = resolve_name(GROUPS[group])
    if not (isinstance(found, type) and issubclass(found, base)):
        return "", f"it is no subclass of {GROUPS[group].replace(':', '.')}"
    if inspect.isabstract(found):
        return "", f"the class leaves {', '.join(sorted(getattr(found, '__abstractmethods__', ())))} undefined"
    return inspect.cleandoc(found.__doc__ or "").partition("\n")[0], ""


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else ""


def _label(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "unknown package"
