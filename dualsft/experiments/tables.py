"""The tables of a comparison, for Markdown, LaTeX and the terminal: means over seeds with 95% intervals.

A cell is the mean ± half of Student's t interval. The best method of a column is bold where its interval does not
overlap with that of the second best; the base model is there to compare with, and never bold.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dualsft.experiments.bootstrap import Estimate
from dualsft.experiments.grid import is_loss
from dualsft.experiments.methods import share
from dualsft.experiments.results import FORGETTING, Outcome, Results
from dualsft.experiments.statistics import mean_interval
from dualsft.runs.table import markdown_table

Value = Callable[[Outcome], float | None]
_REASON = 60  # characters of a failure that a table shows


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
    """A method under its budgets, with the values of each column over its seeds."""

    head: list[str]
    values: list[list[float]]
    competes: bool
    failure: str | None


@dataclass(frozen=True)
class Table:
    """A table of estimates.

    Args:
        heads: Headings of the columns that say which row it is.
        columns: The columns of figures.
        rows: Its rows.
    """

    heads: list[str]
    columns: list[Column]
    rows: list[Row]

    def markdown(self) -> str:
        """The table in Markdown."""
        bold = self._bold()
        cells = [[*row.head, *self._cells(k, row, bold, "**{}**", "±")] for k, row in enumerate(self.rows)]
        return markdown_table([[*self.heads, *(c.heading for c in self.columns)], *cells])

    def latex(self) -> str:
        """The table as a tabular of LaTeX's booktabs."""
        bold = self._bold()
        lines = [[*self.heads, *(c.heading for c in self.columns)]]
        lines = [[_escaped(cell) for cell in line] for line in lines]
        for k, row in enumerate(self.rows):
            lines.append([*map(_escaped, row.head), *self._cells(k, row, bold, r"\textbf{{{}}}", r"$\pm$")])
        head, *body = (f"{' & '.join(line)} \\\\" for line in lines)
        layout = "l" * len(self.heads) + "r" * len(self.columns)
        parts = [rf"\begin{{tabular}}{{{layout}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
        return "\n".join([*parts, r"\end{tabular}"])

    def _cells(self, k: int, row: Row, bold: set[tuple[int, int]], strong: str, plus_minus: str) -> list[str]:
        if row.failure is not None:
            return [row.failure if strong == "**{}**" else _escaped(row.failure), *[""] * (len(self.columns) - 1)]
        cells = []
        for c, (column, values) in enumerate(zip(self.columns, row.values, strict=True)):
            text = _cell(column, values, plus_minus)
            cells.append(strong.format(text) if (k, c) in bold else text)
        return cells

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
    """The row whose interval lies beyond that of the next; None if there is none."""
    sign = -1 if lower_is_better else 1
    ranking = sorted(values, key=lambda k: -sign * float(np.mean(values[k])))
    if len(ranking) < 2:
        return None
    first, second = (_estimate([sign * v for v in values[k]]) for k in ranking[:2])
    return ranking[0] if first is not None and second is not None and first.low > second.high else None


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


def quality_table(results: Results) -> Table:
    """What the trained models are worth, by evaluation and group."""
    return _table(results, [*_evaluation_columns(results), *_group_columns(results)], with_base=True)


def cost_table(results: Results) -> Table:
    """What they cost."""

    def cost(name: str) -> Value:
        return lambda outcome: outcome.costs.get(name)

    columns = [
        Column("trained weights", cost("trained_weights"), digits=0),
        Column("time (s)", cost("seconds"), digits=1),
        Column("peak memory (MiB)", cost("peak_memory_bytes"), 2**-20, 0),
        Column("on disk (MiB)", cost("bytes_on_disk"), 2**-20, 2),
    ]
    return _table(results, columns, with_base=False)


def _evaluation_columns(results: Results) -> list[Column]:
    columns = []
    for name, evaluation in results.grid.evaluations.items():
        shown = ["loss", "exact_match"] if evaluation.max_new_tokens else ["loss"]
        metrics = [*(shown if evaluation.data is not None else []), evaluation.main_metric]
        for metric in dict.fromkeys([*metrics, *([FORGETTING] if evaluation.forgetting else [])]):
            columns.append(_metric_column(results, name, metric))
    return columns


def _metric_column(results: Results, name: str, metric: str) -> Column:
    def value(outcome: Outcome) -> float | None:
        return results.value(outcome, name, metric)

    words = metric.replace("_", " ")
    if is_loss(metric):
        return Column(f"{name} {words}", value, lower_is_better=True, signed=metric == FORGETTING)
    return Column(f"{name} {words} (%)", value, 100, 1, False)


def _group_columns(results: Results) -> list[Column]:
    columns = []
    for name in ("plasticity", "stability"):
        if members := results.grid.group(name):
            losses = is_loss(next(iter(members.values())).main_metric)
            unit, scale, digits = ("nats", 1, 3) if losses else ("points", 100, 1)

            def value(outcome: Outcome, name: str = name) -> float | None:
                return results.group(outcome, name)  # type: ignore[arg-type]

            columns.append(Column(f"{name} ({unit})", value, scale, digits, False, signed=True))
    return columns


def _table(results: Results, columns: list[Column], with_base: bool) -> Table:
    rows = [_row([results.base], columns, False)] if with_base else []
    rows += [_row(outcomes, columns, True) for outcomes in results.by_method().values()]
    return Table(["method", "data", "weights", "runs"], columns, rows)


def _row(outcomes: Sequence[Outcome], columns: Sequence[Column], competes: bool) -> Row:
    """A method's row: its name, its budgets, and how many of its runs there are."""
    first, well = outcomes[0], [of for of in outcomes if of.error is None]
    budgets = [share(first.budgets.data), share(first.budgets.parameters)] if competes else ["-", "-"]
    runs = str(len(well)) if len(well) == len(outcomes) else f"{len(well)} of {len(outcomes)}"
    values = [[v for of in well if (v := column.value(of)) is not None] for column in columns]
    error = first.error or ""
    short = error if len(error) <= _REASON else f"{error[:_REASON].rstrip()}..."
    head = [first.method, *budgets, runs if competes else "-"]
    return Row(head, values, competes, None if well else f"failed: {short}")
