"""Draws the page's figures, once for light and once for dark pages, and embeds them in it."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualsft.errors import UserError
from dualsft.experiments.figure_files import save_figure
from dualsft.reports.blocks import Drawn, Picture
from dualsft.reports.dark import COLOURS, darkened
from dualsft.storage.writing import writing_to

_STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 9.0,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.6,
    "image.cmap": "viridis",
}
_PIXELS = 140  # CSS pixels of an inch, on a wide screen


@dataclass(frozen=True)
class Embedded:
    """A figure as it stands in the page.

    Attributes:
        light: The image, as a ``data:`` address.
        dark: The one for dark pages.
        width: Its width on the page, in CSS pixels.
        height: Its height there.
    """

    light: str
    dark: str
    width: int
    height: int


def draw(picture: Picture, folder: Path) -> Embedded:
    """Save a picture as PNG and SVG in a folder, and embed it."""
    save_in_light = _drawn(picture, "light", lambda figure: save_figure(figure, folder, picture.name))
    svg = next(name for name in save_in_light if name.endswith(".svg"))
    dark = _drawn(picture, "dark", _as_svg)
    width, height = (round(_PIXELS * inches) for inches in picture.size)
    return Embedded(_address((folder / svg).read_bytes()), _address(dark), width, height)


def embed(drawn: Drawn, folder: Path) -> Embedded:
    """Copy a figure that is there, as PNG and SVG, and embed it; refuses one that cannot be read."""
    try:
        files = {kind: drawn.png.with_suffix(f".{kind}").read_bytes() for kind in ("png", "svg")}
        dark = darkened(files["svg"])
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); make that folder again.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{drawn.png.with_suffix('.svg')} is damaged ({error}); make that folder again.") from error
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for kind, content in files.items():
            (folder / f"{drawn.name}.{kind}").write_bytes(content)
    width, height = _size(files["png"])
    return Embedded(_address(files["svg"]), _address(dark), width, height)


def _drawn(picture: Picture, theme: str, use: Callable[[Any], Any]) -> Any:
    """What a use makes of the picture, drawn in the colours of a theme."""
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    surface, text, frame, grid, series = COLOURS[theme]
    colours: dict[Any, Any] = {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), surface),
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), text),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), frame),
        "grid.color": grid,
        "axes.prop_cycle": cycler(color=series),
    }
    with rc_context({**_STYLE, **colours}):
        figure = Figure(figsize=picture.size, dpi=160, layout="constrained")
        picture.paint(figure)
        return use(figure)


def _as_svg(figure: Any) -> bytes:
    import matplotlib

    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "dark"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def _address(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _size(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG on the page: as its header has them, and no wider than a column."""
    width, height = int.from_bytes(png[16:20]), int.from_bytes(png[20:24])
    shown = min(width, 760)
    return shown, round(height * shown / max(width, 1))
