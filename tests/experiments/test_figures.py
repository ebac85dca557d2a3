"""The figures of a comparison."""

import random
from itertools import combinations
from pathlib import Path

import pytest

from dualsft.experiments.bootstrap import Estimate
from dualsft.experiments.figures import draw_comparison
from dualsft.experiments.frontier import Point, frontier
from tests.experiments.cases import results


def points(count: int, seed: int) -> list[Point]:
    """Points on a small lattice, so that some share a coordinate."""
    draw = random.Random(seed)
    values = [[float(draw.randint(0, 4)) for _ in range(2)] for _ in range(count)]
    return [Point(str(k), *(Estimate(v, v, v) for v in pair)) for k, pair in enumerate(values)]


@pytest.mark.parametrize("seed", range(20))
def test_frontier_is_what_nobody_dominates(seed: int) -> None:
    """A point is on the line if and only if no other one costs no more and gains no less, and differs."""
    given = points(8, seed)
    places = {(p.x.value, p.y.value) for p in given}
    expected = {a for a in places if not any(b[0] <= a[0] and b[1] >= a[1] for b in places - {a})}
    found = [(p.x.value, p.y.value) for p in frontier(given)]
    assert set(found) == expected
    assert found == sorted(expected)


@pytest.mark.slow
def test_figures_are_drawn(tmp_path: Path) -> None:
    """Each quantity has a PNG and an SVG, the same bytes each time; one method alone has no figure."""
    given = results({"a": [2.0, 2.5], "b": [2.25, 2.5], "c": [2.0, 2.0]})
    names = draw_comparison(given, tmp_path)
    assert names == [f"gain-against-{x}.{k}" for x in ("forgetting", "time", "memory", "size") for k in ("png", "svg")]
    before = [(tmp_path / name).read_bytes() for name in names]
    draw_comparison(given, tmp_path)
    assert before == [(tmp_path / name).read_bytes() for name in names]
    assert draw_comparison(results({"a": [2.0, 2.5]}), tmp_path) == []


@pytest.mark.slow
def test_labels_do_not_overlap() -> None:
    """Of a dozen crowded points no label covers another one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from dualsft.experiments.labels import place_labels

    draw = random.Random(0)
    figure = Figure(figsize=(3.5, 2.9), dpi=200)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    given = [(draw.gauss(0, 0.3), draw.gauss(0, 0.3)) for _ in range(12)]
    axes.set(xlim=(-1, 1), ylim=(-1, 1))
    place_labels(axes, given, [f"method {k}" for k in range(12)], [])
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 12
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
