"""What several figures share, and figures that other commands have drawn."""

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from dualsft import UserError
from dualsft.experiments.figure_files import save_figure
from dualsft.reports.blocks import Drawn
from dualsft.reports.dark import COLOURS, darkened
from dualsft.reports.figures import asinh_edges, smoothed, thinned
from dualsft.reports.pictures import embed

VALUES = [
    [-3e-6, 0.0, 1e-9, 5e-5],
    [1.0, 1.0, 1.0],
    [0.0],
    [-2.0, -1.0],
    list(np.random.default_rng(0).normal(size=500)),
]


@pytest.mark.parametrize("values", VALUES, ids=range(len(VALUES)))
def test_bins_hold_every_value(values: list[float]) -> None:
    """Edges rise, and no value falls outside of the bins, whatever their sizes."""
    edges = asinh_edges(np.array(values), 20)
    assert (np.diff(edges) > 0).all()
    assert np.histogram(values, edges)[0].sum() == len(values)


def test_running_means_are_those_of_a_loop() -> None:
    """Each value is the mean of the last ones, fewer at the start."""
    values = np.random.default_rng(1).normal(size=30).tolist()
    expected = [np.mean(values[max(0, k - 6) : k + 1]) for k in range(30)]
    assert smoothed(values, 7) == pytest.approx(expected)


@pytest.mark.parametrize("count", [0, 1, 5, 600, 601, 100_000])
def test_long_lines_are_thinned(count: int) -> None:
    """No more points than can be seen, the first and the last among them, in order."""
    found = thinned(count).tolist()
    assert len(found) == min(count, 600)
    assert found == sorted(set(found))
    assert not count or (found[0], found[-1]) == (0, count - 1)


def test_a_drawn_figure_is_copied_whole_or_refused(tmp_path: Path) -> None:
    """PNG and SVG stand beside the page's own; where one is missing the folder is named."""
    png = bytes.fromhex("89504e470d0a1a0a0000000d49484452") + (1520).to_bytes(4) + (400).to_bytes(4)
    (tmp_path / "a.png").write_bytes(png)
    drawn = Drawn("copy", "caption", "alt", tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.svg cannot be read"):
        embed(drawn, tmp_path / "figures")
    (tmp_path / "a.svg").write_text("<svg/>")
    found = embed(drawn, tmp_path / "figures")
    assert (found.width, found.height) == (760, 200)
    assert (tmp_path / "figures" / "copy.png").read_bytes() == png
    assert (tmp_path / "figures" / "copy.svg").read_text() == "<svg/>"


def test_a_figure_drawn_on_white_is_dark_on_dark_pages(tmp_path: Path) -> None:
    """Of an audit's figure no white is left, its text is the page's, and its colours are lighter, like the page's."""
    figure = Figure()
    axes = figure.subplots()
    axes.scatter([1, 2], [3, 4], color="#0072b2", marker="*", label="a # label")
    axes.axhline(3, color="#bbbbbb")
    axes.legend()
    save_figure(figure, tmp_path, "a")
    surface, text, *_, series = COLOURS["dark"]
    found = darkened((tmp_path / "a.svg").read_bytes()).decode()
    used = set(re.findall(r": (#[0-9a-f]{6})", found))
    assert {surface, text} <= used
    assert not used & {"#ffffff", "#000000", "#0072b2", "#bbbbbb"}
    assert f'<svg fill="{text}"' in found
    (blue,) = [colour for colour in used if int(colour[5:], 16) > int(colour[1:3], 16) + 60]
    assert np.abs(np.array([*bytes.fromhex(blue[1:])]) - [*bytes.fromhex(series[0][1:])]).max() < 40
