"""The tables of a comparison."""

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import t

from dualsft.experiments.comparison_tables import cost_table, quality_table
from dualsft.experiments.grid import Budgets, Evaluation
from dualsft.experiments.results import Outcome, Results, base_outcome
from tests.experiments.cases import BASE, grid, outcome, results

CASES = [
    ({"a": [1.0, 1.1, 1.2], "b": [2.0, 2.1, 2.2]}, "a"),
    ({"a": [1.0, 1.5, 2.0], "b": [1.1, 1.6, 2.2]}, None),
    ({"a": [1.0], "b": [2.0]}, None),
    ({"a": [1.0, 1.0], "b": [1.0, 1.0]}, None),
    ({"a": [2.0, 2.1], "b": [1.0, 1.01], "c": [3.0, 3.0]}, "b"),
    ({"a": [1.0, 1.01], "b": [2.0, 2.01], "c": [1.0, 4.0]}, None),
    ({"a": [1.0, 1.1]}, None),
]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's t interval, as scipy has it."""
    low, high = t.interval(0.95, len(values) - 1, np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5)
    return float(low), float(high)


@pytest.mark.parametrize(("losses", "best"), CASES)
def test_bold_is_beyond_chance(losses: dict[str, list[float]], best: str | None) -> None:
    """Bold is the method whose whole interval lies below those of all others, and nobody where there is none."""
    lines = quality_table(results(losses)).markdown().splitlines()[3:]  # behind headings, rule and base model
    assert [name for name, line in zip(losses, lines, strict=True) if "**" in line.split("|")[5]] == (
        [best] if best else []
    )


def test_cells_are_means_and_halves_of_intervals() -> None:
    """The figure behind ± is half of Student's t interval; one seed has none."""
    values = [2.0, 2.5, 2.75]
    low, high = interval(values)
    shown = quality_table(results({"a": values})).markdown()
    assert f"{np.mean(values):.3f} ± {(high - low) / 2:.3f}" in shown
    assert "±" not in quality_table(results({"a": [2.0]})).markdown()


def test_failures_are_told() -> None:
    """A method without a finished run says why; one that lost some says how many there are."""
    failed = [Outcome("both", Budgets(0.1, 0.2), seed, error="memory ran out") for seed in (0, 1)]
    lost = [outcome("random", 0, 2.0), Outcome("random", Budgets(0.1, 0.2), 1, error="no room")]
    table = quality_table(Results(grid(), base_outcome(BASE), [*failed, *lost])).markdown()
    base, both, random = table.splitlines()[-3:]
    assert both.endswith("failed: memory ran out |")
    assert "| 1 of 2 |" in random
    assert "2.000" in random
    assert random.endswith("failed: no room |")
    assert "failed" not in base


def test_shares_are_per_cent_and_answers_are_shown() -> None:
    """Exact match stands beside the loss where answers are generated, and points count the group of a share."""
    evaluations = {
        "target": Evaluation(data="t", max_new_tokens=4, metric="exact_match", group="plasticity"),
        "general": Evaluation(data="g"),
    }
    base = {"target": {"loss": 3.0, "exact_match": 0.25}, "general": {"loss": 1.0}}
    run = Outcome("both", Budgets(), 0, {"target": {"loss": 2.0, "exact_match": 0.5}, "general": {"loss": 1.0}}, {})
    head, _, _, row = (
        quality_table(Results(grid(evaluations=evaluations), base_outcome(base), [run])).markdown().splitlines()
    )
    cells = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (head, row)), strict=True))
    assert cells["target exact match (%)"] == "50.0"
    assert cells["plasticity (points)"] == "+25.0"
    assert cells["data"] == cells["weights"] == "all"


def test_latex_is_escaped() -> None:
    """Names and headings have no bare special characters, and every row has as many cells as the head."""
    table = quality_table(results({"a_b & c%": [2.0, 2.01], "d": [3.0, 3.01]}))
    lines = [line for line in table.latex().splitlines() if line.endswith(r"\\")]
    assert r"a\_b \& c\% & 10\% & 20\% &" in table.latex()
    assert len({line.replace(r"\&", "").count("&") for line in lines}) == 1
    assert r"\textbf{" in table.latex()


def test_costs() -> None:
    """Costs are shown in units that people read, without intervals."""
    row = cost_table(results({"a": [2.0, 2.1]})).markdown().splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[5:9]] == ["30", "2.0", "1", "2.00"]
