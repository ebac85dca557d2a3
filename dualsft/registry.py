"""Names for scorers and allocators: entry points, the built-in ones included. Nothing is imported until it is used."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from dualsft.errors import UserError

GROUPS = ("dualsft.scorers", "dualsft.parameter_allocators", "dualsft.data_allocators")
OURS = "dualsft"


@dataclass(frozen=True)
class Registered:
    """One registered name, for `dualsft plugins`.

    Attributes:
        group: The entry-point group.
        name: The name to write in a configuration.
        package: The distribution that brings it, with its version.
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
    """The import path of a registered class; a dotted path is taken as it is.

    Raises:
        UserError: if nothing has this name, or two packages claim it.
    """
    if "." in name:
        return name
    candidates = list(entry_points(group=group, name=name))
    if not candidates:
        known = ", ".join(sorted({point.name for point in entry_points(group=group)}))
        raise UserError(f"{name!r} is not registered in {group}; known names: {known}; or give a class_path.")
    ours = [point for point in candidates if _package(point) == OURS]
    if not ours and len({point.value for point in candidates}) > 1:
        owners = " and ".join(sorted({_label(point) for point in candidates}))
        raise UserError(f"{name!r} in {group} is claimed by {owners}; uninstall one, or give a class_path.")
    return (ours or candidates)[0].value.replace(":", ".")


def registered() -> Iterator[Registered]:
    """Everything that is registered, in order, with what failed to load and why."""
    for group in GROUPS:
        points = sorted(entry_points(group=group), key=lambda p: (p.name, _package(p) != OURS, _label(p)))
        for point in points:
            yield _inspect(group, point, {_label(p) for p in points if p.name == point.name})


def _inspect(group: str, point: EntryPoint, owners: set[str]) -> Registered:
    description, problem = "", ""
    others = sorted(owners - {_label(point)})
    if others and _package(point) != OURS:
        problem = f"the name is also claimed by {', '.join(others)}"
    try:
        description = (point.load().__doc__ or "").strip().split("\n")[0]
    except (Exception, SystemExit) as error:  # a stranger's import may do anything, and must not take the list down
        problem = f"{type(error).__name__}: {error}"
    return Registered(group, point.name, _label(point), point.value, description, problem)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else ""


def _label(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "unknown package"
