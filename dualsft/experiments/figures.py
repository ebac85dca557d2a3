"""The figures of a comparison: gain on the target against forgetting, time, memory and file size.

A method is a point at its mean over seeds, with 95% intervals as bars. The line leads along the methods that no other
one dominates: none gains as much for less.
"""

from collections.abc import Sequence
from pathlib import Path

from dualsft.experiments.frontier import Axis, draw_frontier
from dualsft.experiments.grid import Budgets, is_loss
from dualsft.experiments.methods import share
from dualsft.experiments.results import Outcome, Results


def draw_comparison(results: Results, folder: Path) -> list[str]:
    """Draw the figures into a folder as PNG and SVG; return the names of the files.

    Methods of which every run failed are left out, and figures with less than two methods too.
    """
    methods = {key: well for key, of in results.by_method().items() if (well := [o for o in of if o.error is None])}
    if len(methods) < 2:
        return []
    names, outcomes = _names(list(methods)), list(methods.values())
    gain = _gain(results, outcomes)
    return [name for axis in _axes(results, outcomes) for name in draw_frontier(folder, names, axis, gain)]


def _names(methods: Sequence[tuple[str, Budgets]]) -> list[str]:
    """The methods' names, with their budgets where one has several."""
    several = {name for name, _ in methods if sum(other == name for other, _ in methods) > 1}
    return [
        f"{name} {share(budgets.data)}/{share(budgets.parameters)}" if name in several else name
        for name, budgets in methods
    ]


def _gain(results: Results, outcomes: Sequence[Sequence[Outcome]]) -> Axis:
    """The change on the plasticity group; without one, on the first evaluation that does not report forgetting."""
    evaluations = results.grid.evaluations
    others = {key: of for key, of in evaluations.items() if not of.forgetting} or evaluations
    members = results.grid.group("plasticity") or dict([next(iter(others.items()))])
    first = next(iter(members.values())).main_metric
    unit, scale = ("nats", 1.0) if is_loss(first) else ("points", 100.0)

    def gain(outcome: Outcome) -> float:
        changes = [results.change(outcome, key, of.main_metric) for key, of in members.items()]
        return scale * sum(changes) / len(changes)

    name = next(iter(members)) if len(members) == 1 else "plasticity"
    metric = f" {first.replace('_', ' ')}" if len({of.main_metric for of in members.values()}) == 1 else ""
    return Axis("gain", f"gain in {name}{metric} ({unit})", [[gain(o) for o in of] for of in outcomes])


def _axes(results: Results, outcomes: Sequence[Sequence[Outcome]]) -> list[Axis]:
    """What the gain is drawn against."""
    axes = []
    if any(of.forgetting for of in results.grid.evaluations.values()):
        values = [[f for o in of if (f := results.forgetting(o)) is not None] for of in outcomes]
        axes.append(Axis("forgetting", "forgetting (nats)", values))
    costs = (("time", "seconds", "time (s)", 1.0), ("memory", "peak_memory_bytes", "peak memory (MiB)", 2**-20))
    for file, key, label, scale in (*costs, ("size", "bytes_on_disk", "file size (MiB)", 2**-20)):
        axes.append(Axis(file, label, [[scale * o.costs[key] for o in of] for of in outcomes], False))
    return axes
