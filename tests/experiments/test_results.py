"""What is computed of a comparison's metrics."""

from typing import Any

import pyarrow as pa
import pytest

from dualsft.errors import UserError
from dualsft.experiments.grid import Budgets, Evaluation
from dualsft.experiments.results import Outcome, Results, base_outcome, parquet_table, plain
from tests.experiments.cases import BASE, COSTS, grid, outcome

COLUMNS = [
    *("method", "budget_data", "budget_parameters", "seed", "evaluation", "metric", "value"),
    *("seconds", "peak_memory_bytes", "trained_weights"),
]


def test_rows() -> None:
    """One row for each run, evaluation and metric, the base model's with neither seed nor costs; failures have none."""
    failed = Outcome("both", Budgets(0.1, 0.2), 1, error="memory ran out")
    rows = Results(grid(), base_outcome(BASE), [outcome("both", 0, 2.5, 1.25), failed]).rows()
    assert len(rows) == 2 * (2 + 3)  # forgetting is the fifth
    table = parquet_table(rows)
    assert table.column_names == COLUMNS
    assert table.schema.field("value").type == pa.float64()
    (forgetting,) = (row for row in rows if row["method"] == "both" and row["metric"] == "forgetting")
    costs = {key: COSTS[key] for key in ("seconds", "peak_memory_bytes", "trained_weights")}
    run = {"method": "both", "budget_data": 0.1, "budget_parameters": 0.2, "seed": 0, "evaluation": "general"}
    assert forgetting == {**run, "metric": "forgetting", "value": 0.25, **costs}
    base = rows[0]
    assert (base["method"], base["seed"], base["budget_data"], base["seconds"]) == ("base model", None, None, None)


def test_changes_are_gains() -> None:
    """Lower losses and higher shares are gains; forgetting is the loss that was gained, and groups take means."""
    both: dict[str, Any] = {"group": "plasticity", "metric": "token_accuracy"}
    evaluations = {"target": Evaluation(data="t", **both), "general": Evaluation(data="g", forgetting=True, **both)}
    run = outcome("both", 0, 2.5, 1.25)
    results = Results(grid(evaluations=evaluations), base_outcome(BASE), [run])
    assert results.change(run, "target", "loss") == 0.5
    assert results.change(run, "target", "token_accuracy") == pytest.approx(0.1)
    assert results.forgetting(run) == 0.25
    assert results.group(run, "plasticity") == pytest.approx((0.1 - 0.05) / 2)


def test_tasks_are_averaged() -> None:
    """A metric of several tasks is the mean over those that have it, without its standard errors."""
    metrics = {"tasks/a/acc": 0.5, "tasks/a/acc/stderr": 0.1, "tasks/b/acc": 0.7, "tasks/b/perplexity": 9.0}
    base = base_outcome({"arc": metrics})
    results = Results(grid(evaluations={"arc": Evaluation(tasks="a,b")}), base, [])
    assert results.value(base, "arc", "acc") == pytest.approx(0.6)
    assert set(plain({"arc": metrics})["arc"]) == {"a/acc", "a/acc/stderr", "b/acc", "b/perplexity"}


def test_a_missing_metric_is_told() -> None:
    """The main metric must be one that the base model's evaluation gave."""
    evaluations = {"target": Evaluation(data="t", metric="f1"), "general": Evaluation(data="g")}
    with pytest.raises(
        UserError, match=r"evaluations\.target has no metric f1; give metric one of loss, token_accuracy"
    ):
        Results(grid(evaluations=evaluations), base_outcome(BASE), [])
