"""The figures of an audit: predicted against measured gains, and measured gains over the bands of the ranking."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dualsft.experiments.figure_files import save_figure
from dualsft.experiments.judgement import AuditRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FAMILIES = {
    "chosen": ("the selection", "*", "#000000", 160),
    "random": ("random subsets", "o", "#0072b2", 28),
    "blocks": ("unions of blocks", "o", "#0072b2", 28),
    "mixture": ("mixtures with the chosen", "^", "#009e73", 32),
    "band": ("bands of the ranking", "s", "#d55e00", 28),
    "pair": ("pairs", "o", "#cc79a7", 28),
}
"""Family -> its name, marker, colour (of Okabe and Ito's, which the colour-blind can tell apart) and size."""
_TITLES = {"data": "examples", "parameters": "weights", "joint": "examples and weights"}


def draw_audit(runs: Sequence[AuditRun], calibrated: bool, folder: Path) -> list[str]:
    """Draw the figures of each scorer and setting, as PNG and SVG; return the files' names.

    Args:
        runs: The runs.
        calibrated: Whether predictions are in nats.
        folder: Where the figures go.
    """
    drawn = []
    for scorer, steps, rate in dict.fromkeys((run.scorer, run.steps, run.learning_rate) for run in runs):
        own = [r for r in runs if (r.scorer, r.steps, r.learning_rate) == (scorer, steps, rate)]
        label = "".join(c if c.isalnum() or c in "-_." else "-" for c in f"{scorer}-{steps}-steps-at-{rate:g}")
        title = f"{scorer}, {steps} steps at {rate:g}"
        drawn += save_figure(_scatters(own, calibrated, title), folder, f"predicted-{label}")
        if any(run.family == "band" for run in own):
            drawn += save_figure(_curves(own, title), folder, f"bands-{label}")
    return drawn


def _sides(runs: Sequence[AuditRun]) -> dict[str, list[AuditRun]]:
    return {side: [run for run in runs if run.side == side] for side in dict.fromkeys(run.side for run in runs)}


def _scatters(runs: Sequence[AuditRun], calibrated: bool, title: str) -> Any:
    """Measured against predicted gains, one panel a side."""
    sides = _sides(runs)
    figure, panels = _panels(len(sides), title)
    for axes, (side, own) in zip(panels, sides.items(), strict=True):
        for family, (name, marker, colour, size) in _FAMILIES.items():
            points = [(run.predicted, _mean(run)) for run in own if run.family == family]
            if points:
                x, y = zip(*points, strict=True)
                axes.scatter(x, y, marker=marker, color=colour, s=size, label=name, alpha=0.8, linewidths=0)
        axes.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
        axes.set_title(_TITLES[side])
        axes.set_xlabel("predicted gain (nats)" if calibrated else "sum of the scores")
        axes.legend(fontsize="small", frameon=False)
    panels[0].set_ylabel("measured gain (nats)")
    return figure


def _curves(runs: Sequence[AuditRun], title: str) -> Any:
    """Measured gains over the bands, one panel a side, with the range over the seeds."""
    sides = {side: [r for r in own if r.family == "band"] for side, own in _sides(runs).items()}
    sides = {side: own for side, own in sides.items() if own}
    figure, panels = _panels(len(sides), title)
    for axes, (side, own) in zip(panels, sides.items(), strict=True):
        means = [_mean(run) for run in own]
        spread = np.array(
            [[m - min(r.gains.values()), max(r.gains.values()) - m] for m, r in zip(means, own, strict=True)]
        )
        axes.errorbar(range(1, len(own) + 1), means, yerr=spread.T, marker="s", color="#d55e00", capsize=2)
        axes.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
        axes.set_title(_TITLES[side])
        axes.set_xlabel("band of the ranking, the highest scores first")
    panels[0].set_ylabel("measured gain (nats)")
    return figure


def _panels(count: int, title: str) -> "tuple[Any, list[Axes]]":
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    figure = Figure(figsize=(4.2 * count, 3.8), dpi=150, layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(panels)


def _mean(run: AuditRun) -> float:
    return float(np.mean(list(run.gains.values())))
