"""Draws the kinds of figures that several sections share, on axes of matplotlib and in the colours that are set."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def grid(axes: Any, axis: str = "y") -> None:
    """Faint lines behind what is drawn."""
    axes.grid(True, axis=axis)
    axes.set_axisbelow(True)


def neutral() -> str:
    """The colour of text, for what belongs to no series."""
    import matplotlib

    return str(matplotlib.rcParams["text.color"])


def frame() -> str:
    """The colour of axes, for what stays in the background."""
    import matplotlib

    return str(matplotlib.rcParams["axes.edgecolor"])


def diverging() -> Any:
    """Colours from the second series' (negative) over the grid's (zero) to the first one's (positive)."""
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap

    settings = matplotlib.rcParams
    first, second = settings["axes.prop_cycle"].by_key()["color"][:2]
    return LinearSegmentedColormap.from_list("diverging", [second, settings["grid.color"], first])


def linear_width(values: np.ndarray) -> float:
    """The half-width of the part around zero that an asinh axis shows as it is: the middle one of the sizes."""
    sizes = np.abs(values[values != 0])
    return float(np.median(sizes)) if len(sizes) else 1.0


def asinh_edges(values: np.ndarray, bins: int) -> np.ndarray:
    """Edges of bins that are equally wide on such an axis, from the least value to the largest."""
    width = linear_width(values)
    low, high = (float(np.arcsinh(of / width)) for of in (values.min(), values.max()))
    edges = width * np.sinh(np.linspace(low, high if high > low else low + 1.0, bins + 1))
    edges[0], edges[-1] = min(edges[0], values.min()), max(edges[-1], values.max())
    return edges


def stacked_bins(axes: Any, edges: np.ndarray, series: Sequence[tuple[str, np.ndarray]]) -> None:
    """Counts in bins, one series on top of the other, each with its name."""
    below = np.zeros(len(edges) - 1)
    for name, counts in series:
        axes.stairs(below + counts, edges, baseline=below, fill=True, label=name)
        below = below + counts


def count_map(figure: Any, axes: Any, x: np.ndarray, y: np.ndarray, counts: np.ndarray, label: str) -> None:
    """How many points fall into each cell of a grid, as one picture whatever their number.

    Args:
        figure: Gets the scale.
        axes: Where it is drawn.
        x: Edges of the cells, one more than columns.
        y: Edges of the cells, one more than rows.
        counts: Column by row.
        label: What is counted.
    """
    from matplotlib.colors import LogNorm

    shown = np.ma.masked_equal(counts.T, 0)
    scale = LogNorm(1, max(2.0, float(counts.max(initial=1))))
    image = axes.pcolormesh(x, y, shown, norm=scale, rasterized=True, cmap="viridis")
    figure.colorbar(image, ax=axes, label=label, pad=0.02)


def smoothed(values: Sequence[float], width: int) -> np.ndarray:
    """The running mean over the last so many values, fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, float))])
    ends = np.arange(1, len(sums))
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def thinned(count: int, most: int = 600) -> np.ndarray:
    """Positions of at most so many of the points of a line, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)) if count else np.array([], int)
