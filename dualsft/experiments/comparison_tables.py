"""The two tables of a comparison: what the trained models are worth, and what they cost."""

from collections.abc import Sequence
from dataclasses import replace

from dualsft.experiments.grid import is_loss
from dualsft.experiments.methods import share
from dualsft.experiments.results import FORGETTING, Outcome, Results
from dualsft.experiments.tables import Column, Row, Table, Value

_HEADS = ["method", "data", "weights", "runs"]
_REASON = 60  # characters of a failure that a table shows


def quality_table(results: Results) -> Table:
    """What the trained models are worth, by evaluation and group."""
    columns = [*_evaluation_columns(results), *_group_columns(results)]
    rows = [_row(outcomes, columns) for outcomes in results.by_method().values()]
    return Table(_HEADS, columns, [_base_row(results.base, columns), *rows])


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
    rows = [_row(outcomes, columns) for outcomes in results.by_method().values()]
    return Table(_HEADS, columns, [replace(row, remark="") for row in rows])


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


def _base_row(base: Outcome, columns: Sequence[Column]) -> Row:
    """The base model's row, with which the others are compared."""
    values = [[v] if (v := column.value(base)) is not None else [] for column in columns]
    return Row([base.method, "-", "-", "-"], values, competes=False)


def _row(outcomes: Sequence[Outcome], columns: Sequence[Column]) -> Row:
    """A method's row: its name, its budgets, and how many of its runs there are."""
    first, well = outcomes[0], [of for of in outcomes if of.error is None]
    runs = str(len(well)) if len(well) == len(outcomes) else f"{len(well)} of {len(outcomes)}"
    values = [[v for of in well if (v := column.value(of)) is not None] for column in columns]
    head = [first.method, share(first.budgets.data), share(first.budgets.parameters), runs]
    return Row(head, values, True, next((_failure(of.error) for of in outcomes if of.error is not None), ""))


def _failure(error: str) -> str:
    """The first words of why a run failed."""
    return f"failed: {error}" if len(error) <= _REASON else f"failed: {error[:_REASON].rstrip()} ..."
