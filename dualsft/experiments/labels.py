"""Labels of points in a figure, placed where they cover neither each other nor anything drawn."""

from collections.abc import Iterator, Sequence
from math import cos, pi, sin
from typing import Any

_DISTANCES = (6.0, 9.0, 14.0, 20.0, 28.0, 38.0, 50.0)  # points of print between a mark and its label
_DIRECTIONS = (0, 2, 6, 4, 1, 7, 3, 5)  # eighths of a turn: right first, then above, below, left
_NEAR = 9.0  # up to which a label needs no line to its mark
_MARK = 5.0
_WORSE = 20.0  # how much worse it is to cover a mark, a label or a line to one, than a thin bar or to be a pixel away

Box = tuple[float, float, float, float]
"""Left, bottom, right and top, in pixels."""


def place_labels(axes: Any, points: Sequence[tuple[float, float]], names: Sequence[str], bars: Sequence[Box]) -> None:
    """Write a name beside each point, the nearest place first that is free; a far one gets a line to its point.

    Args:
        axes: Matplotlib's axes, with everything else drawn and their limits final.
        points: The points, in data coordinates.
        names: Their names.
        bars: What else is to stay uncovered, such as error bars.
    """
    renderer = axes.figure.canvas.get_renderer()
    pixels = [tuple(axes.transData.transform(point)) for point in points]
    scale = axes.figure.dpi / 72
    marks = [(x - _MARK * scale, y - _MARK * scale, x + _MARK * scale, y + _MARK * scale) for x, y in pixels]
    window = axes.get_window_extent(renderer)
    inside = (window.x0, window.y0, window.x1, window.y1)
    taken: list[Box] = [*marks]
    for (x, y), name in sorted(zip(pixels, names, strict=True)):
        width, height = _size(axes, name, renderer)
        others = [mark for mark in taken if not _holds(mark, x, y)]

        def cost(offer: tuple[float, Box, list[Box]], taken: list[Box] = taken, others: list[Box] = others) -> float:
            distance, box, line = offer
            covered = _shared([box], taken) + _shared(line, others) + _outside(box, inside)
            return _WORSE * covered + _shared([box], bars) + scale * distance

        offers = [(d, box, _line(x, y, box) if d > _NEAR else []) for d, box in _places(x, y, width, height, scale)]
        _, box, line = min(offers, key=cost)
        taken += [box, *line]
        _write(axes, name, (x, y), box, bool(line))


def _size(axes: Any, name: str, renderer: Any) -> tuple[float, float]:
    """Width and height of a label in pixels."""
    probe = axes.text(0, 0, name)
    box = probe.get_window_extent(renderer)
    probe.remove()
    return box.width, box.height


def _places(x: float, y: float, width: float, height: float, scale: float) -> Iterator[tuple[float, Box]]:
    """Boxes around a point for a label of a size, with their distances, the nearest first."""
    for distance in _DISTANCES:
        for eighth in _DIRECTIONS:
            dx, dy = cos(eighth * pi / 4), sin(eighth * pi / 4)
            centre_x = x + dx * (distance * scale + width / 2)
            centre_y = y + dy * (distance * scale + height / 2)
            left, bottom = centre_x - width / 2, centre_y - height / 2
            yield distance, (left, bottom, left + width, bottom + height)


def _line(x: float, y: float, box: Box) -> list[Box]:
    """Small boxes along the line from a point to a label."""
    end_x, end_y = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
    steps = [k / 12 for k in range(1, 12)]
    spots = [(x + t * (end_x - x), y + t * (end_y - y)) for t in steps]
    return [(a - 1.5, b - 1.5, a + 1.5, b + 1.5) for a, b in spots]


def _holds(box: Box, x: float, y: float) -> bool:
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def _shared(boxes: Sequence[Box], others: Sequence[Box]) -> float:
    """The area that boxes share with others."""
    return sum(_overlap(box, other) for box in boxes for other in others)


def _outside(box: Box, inside: Box) -> float:
    """The area of a box that lies outside of another one."""
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, inside)


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def _write(axes: Any, name: str, point: tuple[float, float], box: Box, with_line: bool) -> None:
    """Write a name into its box, with a line from the box's nearest edge to the point."""
    from matplotlib.patheffects import withStroke

    back = axes.transData.inverted()
    if with_line:
        edge = (min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3]))
        (x, y), (end_x, end_y) = back.transform(point), back.transform(edge)
        axes.plot([x, end_x], [y, end_y], color="0.55", lw=0.5, zorder=2)
    x, y = back.transform(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
    halo = [withStroke(linewidth=1.5, foreground="white")]  # where it lies on a bar
    axes.text(x, y, name, ha="center", va="center", zorder=4, path_effects=halo)
