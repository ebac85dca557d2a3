"""Draws docs/images/interaction.svg: one matrix, its two sums, and what is chosen by them.

``python -m dev.site.figure`` writes it anew. It follows the reader's choice of light or dark.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "interaction.svg"
EXAMPLES, WEIGHTS, CELL = 8, 10, 30
LEFT, TOP, GAP, LONGEST = 138, 88, 14, 74
WIDTH, HEIGHT = 612, 500
STYLE = """
  text { font: 17px system-ui, sans-serif; fill: #24292f }
  .small { font-size: 15px; fill: #57606a }
  .for { fill: #1f77b4 } .against { fill: #e07b00 }
  .chosen { fill: none; stroke: #24292f; stroke-width: 2 }
  .grid { fill: none; stroke: #8c959f; stroke-width: 0.5 }
  .bit { fill: #24292f }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9da7b1 }
    .for { fill: #5aa9e6 } .against { fill: #f0983a }
    .chosen { stroke: #e6edf3 } .bit { fill: #e6edf3 }
  }
"""


def interactions() -> list[list[float]]:
    """An M of a few examples and weights: g_ij u_j, with g of one common part and noise."""
    random = Random(4)
    u = [random.gauss(0, 1) for _ in range(WEIGHTS)]
    kinship = [random.gauss(0.3, 0.8) for _ in range(EXAMPLES)]
    return [[(a * b + random.gauss(0, 0.6)) * b for b in u] for a in kinship]


def chosen(sizes: Sequence[float], count: int) -> set[int]:
    """The places of the largest values."""
    return set(sorted(range(len(sizes)), key=lambda k: -sizes[k])[:count])


def draw() -> str:
    """The picture as SVG."""
    m = interactions()
    rows, columns = [sum(row) for row in m], [sum(column) for column in zip(*m, strict=True)]
    parts = [*cells(m), *example_side(rows), *weight_side(columns), *words()]
    body = "\n".join(f"  {part}" for part in parts)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    title = "The interaction matrix: row sums choose examples, column sums choose weights"
    return f"{head}\n  <title>{title}</title>\n  <style>{STYLE}  </style>\n{body}\n</svg>\n"


def cells(m: Sequence[Sequence[float]]) -> Iterator[str]:
    """One square for each entry, the stronger the larger it is."""
    largest = max(abs(value) for row in m for value in row)
    for i, row in enumerate(m):
        for j, value in enumerate(row):
            strength = 0.08 + 0.92 * min(1.0, abs(value) / largest * 2)
            yield box(LEFT + j * CELL, TOP + i * CELL, CELL, CELL, sign(value), f' fill-opacity="{strength:.2f}"')
            yield box(LEFT + j * CELL, TOP + i * CELL, CELL, CELL, "grid")


def example_side(sums: Sequence[float]) -> Iterator[str]:
    """A bar for each row sum, and a frame around the rows that are chosen."""
    start = LEFT + WEIGHTS * CELL + GAP
    best, scale = chosen(sums, 2), LONGEST / max(map(abs, sums))
    for i, value in enumerate(sums):
        y, length = TOP + i * CELL, max(1.0, abs(value) * scale)
        yield box(start, y + 8, length, CELL - 16, sign(value))
        if i in best:
            yield box(LEFT, y, WEIGHTS * CELL, CELL, "chosen")
            yield text(start + length + 6, y + 20, "chosen")


def weight_side(sums: Sequence[float]) -> Iterator[str]:
    """A bar for each column sum, and the mask: the bits of the weights with the largest sizes."""
    start, scale = TOP + EXAMPLES * CELL + GAP, LONGEST / max(map(abs, sums))
    best = chosen([abs(value) for value in sums], 3)
    for j, value in enumerate(sums):
        x = LEFT + j * CELL
        yield box(x + 8, start, CELL - 16, max(1.0, abs(value) * scale), sign(value))
        yield box(x + 6, start + LONGEST + 12, CELL - 12, CELL - 12, "bit" if j in best else "grid")


def words() -> Iterator[str]:
    """What the parts are."""
    right, below = LEFT + WEIGHTS * CELL + GAP, TOP + EXAMPLES * CELL
    yield text(8, 24, "M: what example i and weight j do for the target, together")
    yield text(LEFT, TOP - 12, "weights j →", "small")
    yield text(LEFT - 12, TOP + 20, "examples i ↓", "small", "end")
    yield text(right, TOP - 32, "row sums: score")
    yield text(right, TOP - 12, "of each example")
    yield text(LEFT - 12, below + 32, "column sums:", anchor="end")
    yield text(LEFT - 12, below + 53, "score of", anchor="end")
    yield text(LEFT - 12, below + 74, "each weight", anchor="end")
    yield text(LEFT - 12, below + GAP + LONGEST + 28, "mask", anchor="end")
    yield box(LEFT, HEIGHT - 30, 14, 14, "for")
    yield text(LEFT + 20, HEIGHT - 18, "for the target", "small")
    yield box(LEFT + 140, HEIGHT - 30, 14, 14, "against")
    yield text(LEFT + 160, HEIGHT - 18, "against it", "small")
    yield text(right, below + 32, "Both sums add", "small")
    yield text(right, below + 52, "up to the same", "small")
    yield text(right, below + 72, "number.", "small")


def sign(value: float) -> str:
    """The class of a colour."""
    return "for" if value > 0 else "against"


def box(x: float, y: float, width: float, height: float, kind: str, more: str = "") -> str:
    """A rectangle."""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:.4g}" height="{height:.4g}"{more}/>'


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """A line of text."""
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
