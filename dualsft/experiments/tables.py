"""Tables of means over seeds with 95% intervals, for Markdown, LaTeX and the terminal.

A cell is the mean ± half of Student's t interval. The best method of a column is bold where its interval does not
overlap with that of the second best; the base model is there to compare with, and never bold.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dualsft.experiments.bootstrap import Estimate
from dualsft.experiments.results import Outcome
from dualsft.experiments.statistics import mean_interval
from dualsft.runs.table import markdown_table

Value = Callable[[Outcome], float | None]


@dataclass(frozen=True)
class Column:
    """One column of figures.

    Attributes:
        heading: What it is.
        value: The figure of one run; None if there is none.
        scale: What it is multiplied by to be shown.
        digits: Digits behind the point.
        lower_is_better: Which end is the better one; None for none.
        signed: Whether a plus is written.
    """

    heading: str
    value: Value
    scale: float = 1.0
    digits: int = 3
    lower_is_better: bool | None = None
    signed: bool = False

    def shown(self, value: float) -> str:
        """A figure as it is shown."""
        rounded = round(self.scale * value, self.digits) + 0.0  # without a minus before zero
        return f"{rounded:{'+' if self.signed else ''},.{self.digits}f}"


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        head: What it is.
        values: The values of each column over the seeds.
        competes: Whether it can be the best.
        remark: What is to be said of it.
    """

    head: list[str]
    values: list[list[float]]
    competes: bool
    remark: str = ""


@dataclass(frozen=True)
class Table:
    """A table of estimates.

    Args:
        heads: Headings of the columns that say which row it is.
        columns: The columns of figures.
        rows: Its rows; where any has a remark, remarks are the last column.
    """

    heads: list[str]
    columns: list[Column]
    rows: list[Row]

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [[*row.head, *cells, *self._remark(row)] for row, cells in self._filled("**{}**", "±")]
        return markdown_table([self._headings(), *lines])

    def latex(self) -> str:
        """The table as a tabular of LaTeX's booktabs."""
        lines = [[_escaped(cell) for cell in self._headings()]]
        for row, cells in self._filled(r"\textbf{{{}}}", r"$\pm$"):
            lines.append([*map(_escaped, row.head), *cells, *map(_escaped, self._remark(row))])
        head, *body = (f"{' & '.join(line)} \\\\" for line in lines)
        layout = "l" * len(self.heads) + "r" * len(self.columns) + "l" * self._has_remarks
        parts = [rf"\begin{{tabular}}{{{layout}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
        return "\n".join([*parts, r"\end{tabular}"])

    @property
    def _has_remarks(self) -> bool:
        return any(row.remark for row in self.rows)

    def _headings(self) -> list[str]:
        return [*self.heads, *(column.heading for column in self.columns), *([""] if self._has_remarks else [])]

    def _remark(self, row: Row) -> list[str]:
        return [row.remark] if self._has_remarks else []

    def _filled(self, strong: str, plus_minus: str) -> Iterator[tuple[Row, list[str]]]:
        """Each row with its cells."""
        bold = self._bold()
        for k, row in enumerate(self.rows):
            cells = [_cell(column, of, plus_minus) for column, of in zip(self.columns, row.values, strict=True)]
            yield row, [strong.format(cell) if (k, c) in bold else cell for c, cell in enumerate(cells)]

    def _bold(self) -> set[tuple[int, int]]:
        """The cells, by row and column, that are best by more than chance."""
        found = set()
        for c, column in enumerate(self.columns):
            if column.lower_is_better is not None:
                of = {k: row.values[c] for k, row in enumerate(self.rows) if row.competes and row.values[c]}
                if (best := _best(of, column.lower_is_better)) is not None:
                    found.add((best, c))
        return found


def _best(values: dict[int, list[float]], lower_is_better: bool) -> int | None:
    """The row whose interval lies beyond those of all others; None if there is none."""
    sign = -1 if lower_is_better else 1
    ranking = sorted(values, key=lambda k: -sign * float(np.mean(values[k])))
    if len(ranking) < 2:
        return None
    first, *others = (_estimate([sign * v for v in values[k]]) for k in ranking)
    beaten = first is not None and all(other is not None and first.low > other.high for other in others)
    return ranking[0] if beaten else None


def _estimate(values: Sequence[float]) -> Estimate | None:
    return mean_interval(np.array(values, dtype=float))


def _cell(column: Column, values: Sequence[float], plus_minus: str) -> str:
    """The mean and half the interval, where there is one."""
    if not values:
        return "-"
    found = _estimate(values)
    mean = column.shown(float(np.mean(values)))
    if found is None or column.lower_is_better is None:
        return mean
    half = f"{abs(column.scale) * (found.high - found.value):,.{column.digits}f}"
    return f"{mean} {plus_minus} {half}"


def _escaped(text: str) -> str:
    """A text for LaTeX."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {c: f"\\{c}" for c in "&%$#_{}"}
    return "".join(special.get(c, c) for c in text)
