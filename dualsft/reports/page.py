"""The page: sections as one HTML file, with all that it shows within it."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dualsft.reports.blocks import Picture, Section
from dualsft.reports.pictures import draw, embed


def render(title: str, sections: Sequence[Section], figures: Path) -> str:
    """The HTML of a page, every text in it escaped.

    Args:
        title: Its title.
        sections: Its sections.
        figures: Folder that its figures are saved in.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dualsft.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"kind": lambda block: type(block).__name__}
    environment.globals |= {"picture": partial(_picture, figures), "anchor": _anchors(), "version": version("dualsft")}
    return environment.get_template("report.html.j2").render(title=title, sections=sections)


_HIDDEN = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {127: 0x2421}
_HIDDEN |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)
"""Control characters, which HTML forbids, and marks that turn the direction of what follows -> what is shown."""


def _visible(value: Any) -> Any:
    """A text whose control characters are seen, and do nothing."""
    return value.translate(_HIDDEN) if isinstance(value, str) else value


def _picture(folder: Path, block: Any) -> Any:
    return draw(block, folder) if isinstance(block, Picture) else embed(block, folder)


def _anchors() -> Callable[[Section], str]:
    """A function that names a section in addresses: the same section always alike, two never."""
    given: dict[int, str] = {}

    def anchor(section: Section) -> str:
        if id(section) not in given:
            words = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") or "section"
            taken = set(given.values())
            names = (words, *(f"{words}-{k}" for k in range(2, len(taken) + 3)))
            given[id(section)] = next(name for name in names if name not in taken)
        return given[id(section)]

    return anchor
