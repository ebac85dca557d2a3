"""Where the mask fell: density and summed score by layer and kind of module."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualsft.allocators.groups import KINDS
from dualsft.reports.blocks import Block, Picture, Table, Text
from dualsft.reports.figures import diverging, linear_width
from dualsft.reports.selections.subject import Subject
from dualsft.reports.words import Unit, percent, signed
from dualsft.selection.diagnostics import ALL, PlaceCounts, by_place
from dualsft.selection.diagnostics.parameters import tensors_of

_ROW, _MARGIN, _LOWEST, _HIGHEST = 0.2, 0.95, 2.2, 7.0  # inches: a layer, names around it, and the limits of a figure
_TICKS = 16  # names of layers at most


@dataclass(frozen=True)
class _Map:
    """Layers by kinds; NaN where a layer has no module of the kind."""

    layers: list[str]
    kinds: list[str]
    density: np.ndarray
    score: np.ndarray


def weights(subject: Subject) -> list[Block]:
    """The two heat maps, their figures, and the tensors that hold most of the score."""
    places = by_place(tensors_of(subject.selection.parameters))
    table = _map(places)
    height = min(max(_ROW * len(table.layers) + _MARGIN, _LOWEST), _HIGHEST)
    densest, richest = _most(places, lambda of: of.density), _most(places, lambda of: of.score_sum or 0.0)
    alt = f"Two heat maps of layers by kinds of module. The mask is densest in {_name(densest)}"
    alt += f" ({percent(densest.density)})"
    alt += (
        f"; the summed score is highest in {_name(richest)} ({subject.shown(richest.score_sum)})."
        if richest.score_sum
        else "."
    )
    picture = Picture(
        f"{subject.file_name}-weights",
        "Left, the share of the weights that is chosen; right, the sum of their scores; by layer and kind of module.",
        alt,
        lambda figure: _paint(figure, table, subject.unit),
        (4.8, height),
        _numbers(table, subject.unit),
    )
    kinds = _by_kind(places, subject.unit)
    told = Text(_told(places, densest))
    return [told, picture, kinds]


def _most(places: Sequence[PlaceCounts], key: Any) -> PlaceCounts:
    return max((of for of in places if of.kind != ALL), key=key)


def _told(places: Sequence[PlaceCounts], densest: PlaceCounts) -> str:
    if all(of.selected == of.size for of in places):
        return "All weights are chosen."
    fullest = _most(places, lambda of: of.selected)
    share = fullest.selected / max(1, sum(of.selected for of in places if of.kind == ALL))
    return (
        f"The largest part of the mask, {percent(share)}, is in {_name(fullest)}; it is densest in {_name(densest)}, "
        f"where {percent(densest.density)} of the {densest.size:,} weights are chosen. “Other” are norms, embeddings "
        "and whatever is no projection."
    )


def _name(of: PlaceCounts) -> str:
    where = "outside of the layers" if of.layer is None else f"of layer {of.layer}"
    return f"{'other modules' if of.kind == 'other' else of.kind} {where}"


def _map(places: Sequence[PlaceCounts]) -> _Map:
    layers = list(dict.fromkeys(of.layer for of in places))
    kinds = [kind for kind in KINDS if any(of.kind == kind for of in places)]
    density, score = (np.full((len(layers), len(kinds)), np.nan) for _ in range(2))
    for of in places:
        if of.kind != ALL:
            cell = layers.index(of.layer), kinds.index(of.kind)
            density[cell] = of.density
            score[cell] = np.nan if of.score_sum is None else of.score_sum
    return _Map(["outside" if layer is None else str(layer) for layer in layers], kinds, density, score)


def _paint(figure: Any, table: _Map, unit: Unit) -> None:
    from matplotlib.colors import AsinhNorm, PowerNorm

    left, right = figure.subplots(1, 2, sharey=True)
    most = float(np.nanmax(table.density)) or 1.0
    _panel(figure, left, table, 100 * table.density, PowerNorm(0.5, 0, 100 * most), "viridis", "weights chosen (%)")
    left.set_ylabel("layer")
    score = table.score / unit.size
    size = float(np.nanmax(np.abs(score))) if np.isfinite(score).any() else 0.0
    if size:
        scale = AsinhNorm(linear_width(score[np.isfinite(score)]), vmin=-size, vmax=size)
        bar = _panel(figure, right, table, score, scale, diverging(), unit.label("sum of the scores"))
        bar.set_ticks([-size, 0, size], labels=[signed(-size, 2), "0", signed(size, 2)])
    else:
        right.set_axis_off()


def _panel(figure: Any, axes: Any, table: _Map, values: np.ndarray, scale: Any, colours: Any, label: str) -> Any:
    image = axes.imshow(values, aspect="auto", norm=scale, cmap=colours, interpolation="none")
    step = -(-len(table.layers) // _TICKS)
    axes.set_yticks(range(0, len(table.layers), step), table.layers[::step])
    axes.set_xticks(range(len(table.kinds)), table.kinds, rotation=90)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure.colorbar(image, ax=axes, label=label, location="top", pad=0.02, aspect=28)


def _numbers(table: _Map, unit: Unit) -> Table:
    rows = [
        [layer, *(_cell(d, s, unit) for d, s in zip(densities, scores, strict=True))]
        for layer, densities, scores in zip(table.layers, table.density, table.score, strict=True)
    ]
    caption = f"The heat maps in numbers: share chosen, and {unit.label('sum of the scores')}"
    return Table(caption, ["layer", *table.kinds], rows, folded=True)


def _cell(density: float, score: float, unit: Unit) -> str:
    return "–" if np.isnan(density) else f"{percent(density)}, {unit.show(score, 2)}"


def _by_kind(places: Sequence[PlaceCounts], unit: Unit) -> Table:
    rows = []
    chosen = sum(of.selected for of in places if of.kind == ALL)
    for kind in KINDS:
        own = [of for of in places if of.kind == kind]
        if own:
            size, selected = sum(of.size for of in own), sum(of.selected for of in own)
            score = sum(of.score_sum for of in own if of.score_sum is not None)
            shares = [percent(selected / size if size else 0.0), percent(selected / chosen if chosen else 0.0)]
            rows.append([kind, f"{size:,}", f"{selected:,}", *shares, unit.show(score)])
    head = ["kind", "weights", "chosen", "density", "share of the mask", unit.label("sum of the scores")]
    return Table("The mask by kind of module, all layers together", head, rows)
