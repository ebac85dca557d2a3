"""The colours of light and of dark pages, and figures that were drawn for light ones in those of dark ones."""

import re

COLOURS = {
    # surface, text, lines of the frame, grid; then the series: Okabe and Ito's, lighter ones on a dark page
    "light": ("#ffffff", "#1d2129", "#7a828e", "#e6e8ec", ("#0072b2", "#d55e00", "#007a5a", "#b0508a", "#8a6d00")),
    "dark": ("#181b20", "#e6e8eb", "#8b939e", "#31363e", ("#5ab4ea", "#ff9a4d", "#3ecf9f", "#e79ac6", "#e3c44b")),
}
_SURFACE, _TEXT, *_ = COLOURS["dark"]
_COLOUR = re.compile(r"(?<=: )#[0-9a-fA-F]{6}\b")  # as matplotlib writes them, in styles
_LIGHTER = 0.35  # of the way to white: as far as the page's own series are from those of light pages


def darkened(svg: bytes) -> bytes:
    """A figure that matplotlib wrote on white, for a dark page.

    Greys change their places, white becoming the page's surface and black its text; other colours become lighter. What
    has no colour of its own, as text has not, is black, and takes the figure's.
    """
    text = _COLOUR.sub(lambda found: _dark(found[0]), svg.decode())
    return text.replace("<svg ", f'<svg fill="{_TEXT}" ', 1).encode()


def _dark(colour: str) -> str:
    channels = _channels(colour)
    if len(set(channels)) == 1:
        return _mixed(_channels(_TEXT), _channels(_SURFACE), channels[0] / 255)
    return _mixed(channels, (255, 255, 255), _LIGHTER)


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def _mixed(one: tuple[int, ...], other: tuple[int, ...], share: float) -> str:
    """A colour between two, with this share of the other."""
    return "#" + bytes(round(a + share * (b - a)) for a, b in zip(one, other, strict=True)).hex()
