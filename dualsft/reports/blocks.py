"""What a page is made of: sections of texts, tables, pictures and examples, without a word of HTML."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: Plain text; whatever it quotes is escaped on the page.
        kind: ``lead`` for the paragraph that one reads first, ``caution`` for what is odd, ``note`` for an explanation.
    """

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Attributes:
        caption: What it shows.
        head: Names of the columns.
        rows: Their cells, as many as columns.
        wordy: Positions of the columns that hold words, not numbers; the first always does.
        folded: Whether a reader has to open it.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    wordy: frozenset[int] = frozenset()
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure that is drawn for the page.

    Attributes:
        name: Its file's name, without an ending.
        caption: What it shows.
        alt: What one sees in it, for those who do not.
        paint: Draws on an empty figure of matplotlib, in the colours that are set.
        size: Width and height, in inches.
        numbers: What it shows, in numbers.
    """

    name: str
    caption: str
    alt: str
    paint: Callable[[Any], None] = field(compare=False)
    size: tuple[float, float] = (4.6, 2.6)
    numbers: Table | None = None


@dataclass(frozen=True)
class Drawn:
    """A figure that another command has drawn: a PNG, and an SVG beside it."""

    name: str
    caption: str
    alt: str
    png: Path


@dataclass(frozen=True)
class Piece:
    """A part of an example's text.

    Attributes:
        text: The characters.
        level: How much it speaks for the example, from -5 to 5.
        title: What is told of it.
        learnt: Whether it is part of an answer.
    """

    text: str
    level: int = 0
    title: str = ""
    learnt: bool = True


@dataclass(frozen=True)
class Example:
    """An example of the pool in full.

    Attributes:
        title: Which one it is.
        facts: Its score and what else is known of it.
        pieces: Its text.
        note: What its tokens' colours say, in words.
    """

    title: str
    facts: str
    pieces: Sequence[Piece]
    note: str = ""


Block: TypeAlias = Text | Table | Picture | Drawn | Example


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading, with further ones within."""

    title: str
    blocks: Sequence[Block] = ()
    sections: Sequence["Section"] = ()
