"""Tables for the terminal that are Markdown as well."""

from collections.abc import Sequence


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of equally many cells, the headings first; the first column is left-aligned, the rest right.

    Every column is as wide as its widest cell.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * (w - 1) + ":" if k else "-" * w for k, w in enumerate(widths)]
    return "\n".join(_line(row, widths) for row in [rows[0], rule, *rows[1:]])


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = zip(row, widths, strict=True)
    return f"| {' | '.join(cell.rjust(w) if k else cell.ljust(w) for k, (cell, w) in enumerate(cells))} |"
