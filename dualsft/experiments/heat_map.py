"""The heat map of where chosen weights are: a panel for each method, layers downwards, kinds of modules across."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dualsft.experiments.figure_files import save_figure
from dualsft.experiments.patterns import Densities

_ACROSS = 4  # panels in a row
_CELL, _WIDTH, _MARGIN = 0.13, 2.2, 0.85  # inches: a layer's height, a panel's width, room for title and names
_STYLE: Any = {"font.size": 7, "axes.linewidth": 0.6}
_TICKS = 12  # names of layers that a panel shows at most


def draw_layers(tables: Sequence[Densities], folder: Path) -> list[str]:
    """Draw the tables as one figure, PNG and SVG; return the names of the files.

    All panels have one scale of colours, from nothing to the highest density of all, by its square root: a few norms
    that are chosen nearly whole would leave one colour to all else.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import PowerNorm

    across = min(_ACROSS, len(tables))
    down = -(-len(tables) // across)
    size = across * _WIDTH + 0.8, down * (_CELL * max(len(table.layers) for table in tables) + _MARGIN)
    scale = PowerNorm(0.5, vmin=0, vmax=100 * max(float(np.nanmax(table.values)) for table in tables))
    with pyplot.rc_context(_STYLE):
        figure, panels = pyplot.subplots(down, across, figsize=size, dpi=200, layout="constrained", squeeze=False)
        for axes, table in zip(panels.flat, tables, strict=False):
            image = _panel(axes, table, scale)
        for axes in panels.flat[len(tables) :]:
            axes.set_axis_off()
        figure.colorbar(image, ax=panels, label="weights chosen (%)", fraction=0.04, pad=0.02)
        files = save_figure(figure, folder, "layers")
        pyplot.close(figure)
    return files


def _panel(axes: Any, table: Densities, scale: Any) -> Any:
    """One table; places where a layer has no module of the kind stay white."""
    image = axes.imshow(100 * table.values, aspect="auto", cmap="viridis", norm=scale, interpolation="none")
    step = -(-len(table.layers) // _TICKS)
    axes.set_yticks(range(0, len(table.layers), step), table.layers[::step])
    axes.set_xticks(range(len(table.kinds)), table.kinds, rotation=90)
    axes.tick_params(length=0)
    axes.set(title=table.title, ylabel="layer")
    return image
