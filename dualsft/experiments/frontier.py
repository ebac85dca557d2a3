"""One figure of gains against something else, with the line of the methods that no other one dominates."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dualsft.experiments.bootstrap import Estimate
from dualsft.experiments.figure_files import save_figure
from dualsft.experiments.labels import Box, place_labels
from dualsft.experiments.statistics import mean_interval

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
_MARKERS = "osD^vPXh"
_WIDTH, _HEIGHT = 3.5, 2.9  # inches: one column of a page
_MOST_NAMES = 9  # more would cover the figure: they are numbered
_COLUMNS, _LINE = 2, 0.125  # of the legend; inches
_WIDE = 20.0  # ratio of the largest to the smallest value from which on an axis is logarithmic
_STYLE: Any = {
    "font.size": 7.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


class Axis(NamedTuple):
    """One quantity: the name of its file, its label, its value for each run of a method, and whether bars are drawn."""

    file: str
    label: str
    values: list[list[float]]
    with_bars: bool = True


class Point(NamedTuple):
    """A method in a figure."""

    name: str
    x: Estimate
    y: Estimate


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other one dominates, by less x and at least as much y, from the cheapest on."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x.value, -p.y.value)):
        if not found or point.y.value > found[-1].y.value:
            found.append(point)
    return found


def _estimate(values: Sequence[float], with_bars: bool = True) -> Estimate:
    """Mean and interval; the mean itself for the interval of one value, or where none is wanted."""
    mean = float(np.mean(values))
    found = mean_interval(np.array(values, dtype=float)) if with_bars else None
    return found or Estimate(mean, mean, mean)


def draw_frontier(folder: Path, names: Sequence[str], axis: Axis, gain: Axis) -> list[str]:
    """Draw one figure; return the names of its files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    values = zip(names, axis.values, gain.values, strict=True)
    points = [Point(name, _estimate(x, axis.with_bars), _estimate(y)) for name, x, y in values]
    rows = -(-len(points) // _COLUMNS) if len(points) > _MOST_NAMES else 0
    with pyplot.rc_context(_STYLE):
        size = (_WIDTH, _HEIGHT + _LINE * rows)
        figure, axes = pyplot.subplots(figsize=size, dpi=200, layout="constrained")
        _plot(axes, points)
        if rows:
            points = _numbered(figure, axes, points)
        _scale(axes, points)
        axes.set(xlabel=axis.label, ylabel=gain.label)
        _finish(figure, axes, points)
        files = save_figure(figure, folder, f"gain-against-{axis.file}")
        pyplot.close(figure)
    return files


def _numbered(figure: Any, axes: Any, points: Sequence[Point]) -> list[Point]:
    """The points under numbers, whose names stand in a legend below."""
    marks = axes.containers  # one for each point, in their order
    names = [f"{k}  {point.name}" for k, point in enumerate(points, 1)]
    style = {"frameon": False, "fontsize": 6.5, "columnspacing": 1.0, "handletextpad": 0.2, "labelspacing": 0.35}
    figure.legend([mark[0] for mark in marks], names, loc="outside lower center", ncols=_COLUMNS, **style)
    return [point._replace(name=str(k)) for k, point in enumerate(points, 1)]


def _plot(axes: Any, points: Sequence[Point]) -> None:
    """The points with their intervals, and the line of those that are not dominated."""
    best = frontier(points)
    axes.step([p.x.value for p in best], [p.y.value for p in best], where="post", color="0.7", lw=1.0, zorder=1)
    for k, point in enumerate(points):
        color = _COLORS[k % len(_COLORS)]
        widths = {f"{name}err": _halves(of) for name, of in (("x", point.x), ("y", point.y))}
        look = {"fmt": _MARKERS[k % len(_MARKERS)], "ms": 4.5, "mew": 0, "elinewidth": 0.8, "zorder": 3}
        axes.errorbar([point.x.value], [point.y.value], **widths, **look, color=color, ecolor=(color, 0.5))


def _scale(axes: Any, points: Sequence[Point]) -> None:
    """Set scales, limits and ticks; a bar that is much longer than the range of the means leaves the figure."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_ylim(*_limits([p.y for p in points]))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    if all(p.x.low > 0 for p in points) and max(p.x.value for p in points) > _WIDE * min(p.x.value for p in points):
        axes.set_xscale("log")
        axes.margins(x=0.16)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(*_limits([p.x for p in points]))
        axes.xaxis.set_major_locator(MaxNLocator(5))


def _limits(values: Sequence[Estimate]) -> tuple[float, float]:
    """The range of the means and their intervals, of these no more than as much again on either side, and a margin."""
    low, high = min(v.value for v in values), max(v.value for v in values)
    span = (high - low) or abs(high) or 1.0
    low, high = max(low - span / 2, min(v.low for v in values)), min(high + span / 2, max(v.high for v in values))
    return low - 0.14 * (high - low or span), high + 0.14 * (high - low or span)


def _halves(of: Estimate) -> list[list[float]]:
    """How far the interval reaches below and above the mean, as matplotlib takes it."""
    return [[of.value - of.low], [of.high - of.value]]


def _finish(figure: Any, axes: Any, points: Sequence[Point]) -> None:
    """Write the labels, once the layout is final."""
    figure.canvas.draw()
    figure.set_layout_engine("none")
    axes.set_autoscale_on(False)
    bars = [*(box for point in points for box in _bars(axes, point)), *_steps(axes, frontier(points))]
    place_labels(axes, [(p.x.value, p.y.value) for p in points], [p.name for p in points], bars)


def _bars(axes: Any, point: Point) -> list[Box]:
    """The boxes of a point's two error bars, in pixels."""
    corners = axes.transData.transform([(point.x.low, point.y.low), (point.x.high, point.y.high)])
    ((left, bottom), (right, top)), (x, y) = corners.tolist(), axes.transData.transform((point.x.value, point.y.value))
    return [(left, y - 2, right, y + 2), (x - 2, bottom, x + 2, top)]


def _steps(axes: Any, points: Sequence[Point]) -> list[Box]:
    """The boxes of the line along the frontier, in pixels."""
    pixels = [axes.transData.transform((point.x.value, point.y.value)).tolist() for point in points]
    steps = [((x, y - 1, right, y + 1), (right - 1, y, right + 1, up)) for (x, y), (right, up) in pairwise(pixels)]
    return [box for step in steps for box in step]
