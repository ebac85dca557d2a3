"""What the runs of a comparison gave: metrics, changes relative to the base model, and the rows of ``results.parquet``.

With b the base model's value of a metric and a the trained model's, the change is a − b, turned round for losses so
that higher is better. The mean of a group is that of its evaluations' changes, each of its main metric. Forgetting is
a − b of the loss.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dualsft.allocators import Budget
from dualsft.errors import UserError
from dualsft.experiments.grid import BASE, Budgets, Grid, Group, is_loss
from dualsft.experiments.methods import label

FORGETTING = "forgetting"


@dataclass(frozen=True)
class Outcome:
    """What became of one run.

    Attributes:
        method: The method's name.
        budgets: How much of each side was trained.
        seed: Of selection and fit; None for the base model.
        metrics: Evaluation -> metric -> value.
        costs: seconds (the selection's included, if the run depends on scores), peak_memory_bytes, bytes_on_disk (of
            the delta or the adapter), trained_weights.
        error: Why it failed; None if it did not.
    """

    method: str
    budgets: Budgets
    seed: int | None
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None


class Results:
    """The outcomes of a comparison, measured against the base model.

    Args:
        grid: The grid.
        base: The base model's outcome.
        outcomes: Those of the runs.

    Raises:
        UserError: if the base model has not the main metric of an evaluation.
    """

    def __init__(self, grid: Grid, base: Outcome, outcomes: Sequence[Outcome]) -> None:
        self.grid, self.base = grid, base
        self.outcomes = list(outcomes)
        check_metrics(grid, base)

    def value(self, outcome: Outcome, evaluation: str, metric: str) -> float | None:
        """A metric of a run; of several tasks it is the mean; None if the run failed."""
        if outcome.error is not None:
            return None
        if metric == FORGETTING:
            return -self.change(outcome, evaluation, "loss")
        return _mean(_found(outcome.metrics[evaluation], metric))

    def change(self, outcome: Outcome, evaluation: str, metric: str) -> float:
        """By how much a metric is better than the base model's; negative if it is worse."""
        after, before = (_mean(_found(of.metrics[evaluation], metric)) for of in (outcome, self.base))
        return before - after if is_loss(metric) else after - before

    def group(self, outcome: Outcome, name: Group) -> float | None:
        """The mean change over a group's evaluations; None if the run failed."""
        if outcome.error is not None:
            return None
        return _mean([self.change(outcome, key, of.main_metric) for key, of in self.grid.group(name).items()])

    def forgetting(self, outcome: Outcome) -> float | None:
        """The mean forgetting over the evaluations that report it; None if the run failed."""
        if outcome.error is not None:
            return None
        names = [key for key, of in self.grid.evaluations.items() if of.forgetting]
        return _mean([-self.change(outcome, key, "loss") for key in names])

    def by_method(self) -> dict[tuple[str, Budgets], list[Outcome]]:
        """The outcomes of each method under each budget, in the grid's order."""
        found: dict[tuple[str, Budgets], list[Outcome]] = {}
        for outcome in self.outcomes:
            found.setdefault((outcome.method, outcome.budgets), []).append(outcome)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """One row for each run, evaluation and metric; runs that failed have none."""
        return [row for outcome in (self.base, *self.outcomes) for row in self._rows(outcome)]

    def failures(self) -> list[dict[str, Any]]:
        """The runs that failed, with the reasons."""
        return [
            {
                "run": label(of.method, of.budgets, of.seed),
                "method": of.method,
                "budget_data": of.budgets.data,
                "budget_parameters": of.budgets.parameters,
                "seed": of.seed,
                "error": of.error,
            }
            for of in self.outcomes
            if of.error is not None
        ]

    def _rows(self, outcome: Outcome) -> Iterable[dict[str, Any]]:
        of_run = {
            "method": outcome.method,
            "budget_data": _number(outcome.budgets.data),
            "budget_parameters": _number(outcome.budgets.parameters),
            "seed": outcome.seed,
        }
        costs = {key: outcome.costs.get(key) for key in ("seconds", "peak_memory_bytes", "trained_weights")}
        for name, metrics in outcome.metrics.items():
            measured = dict(metrics)
            if self.grid.evaluations[name].forgetting:
                measured[FORGETTING] = -self.change(outcome, name, "loss")
            for metric, value in measured.items():
                yield {**of_run, "evaluation": name, "metric": metric, "value": value, **costs}


def parquet_table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The rows as the table of ``results.parquet``.

    A budget is a fraction up to 1, a count from 1 on (1.0 is everything, as is null), or null for everything; seed and
    costs of the base model are null.
    """
    import pyarrow as pa

    text, number, whole = pa.string(), pa.float64(), pa.int64()
    kinds = {"method": text, "budget_data": number, "budget_parameters": number, "seed": whole, "evaluation": text}
    kinds |= {"metric": text, "value": number, "seconds": number, "peak_memory_bytes": whole, "trained_weights": whole}
    return pa.Table.from_pylist([dict(row) for row in rows], schema=pa.schema(list(kinds.items())))


def check_metrics(grid: Grid, base: Outcome) -> None:
    """Refuse a main metric that an evaluation does not give, by what it gave for the base model."""
    for name, evaluation in grid.evaluations.items():
        metrics = base.metrics[name]
        if not _found(metrics, evaluation.main_metric):
            known = sorted({key.rpartition("/")[2] for key in metrics} - {"stderr"})
            raise UserError(
                f"evaluations.{name} has no metric {evaluation.main_metric}; give metric one of {', '.join(known)}."
            )


def base_outcome(metrics: Mapping[str, Mapping[str, float]]) -> Outcome:
    """The outcome of the base model."""
    return Outcome(BASE, Budgets(), None, plain(metrics))


def plain(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Metrics of tasks by TASK/METRIC."""
    return {name: {key.removeprefix("tasks/"): value for key, value in of.items()} for name, of in metrics.items()}


def _found(metrics: Mapping[str, float], metric: str) -> list[float]:
    """The values of a metric; of tasks, the value of each that has it."""
    if metric in metrics:
        return [metrics[metric]]
    return [value for key, value in metrics.items() if key.rpartition("/")[2] == metric]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _number(budget: Budget) -> float | None:
    return None if budget is None else float(budget)
