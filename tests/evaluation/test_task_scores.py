from typing import Any

from dualsft.evaluation import TaskScore, task_scores
from dualsft.evaluation.task_scores import task_metrics, task_report

RESULTS: dict[str, Any] = {
    "results": {
        "gsm8k": {
            "name": "gsm8k",
            "alias": "gsm8k",
            "sample_len": 1319,
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": 0.012,
            "exact_match,flexible-extract": 0.5,
            "exact_match_stderr,flexible-extract": "N/A",
        },
        "both": {
            "name": "both",
            "alias": "both",
            "sample_len": 1400,
            "acc,none": 1,
            "acc_stderr,none": 0.0,
            "sample_count": {"acc,none": 81},
        },
    },
    "n-shot": {"gsm8k": 5},
    "warnings": [],
}


def test_scores() -> None:
    """A filter with a name is part of the metric's; a group's metric counts the questions that it is over."""
    assert task_scores(RESULTS) == [
        TaskScore("gsm8k", "exact_match,strict-match", 0.25, 0.012, 1319, 5),
        TaskScore("gsm8k", "exact_match,flexible-extract", 0.5, None, 1319, 5),
        TaskScore("both", "acc", 1.0, 0.0, 81, None),
    ]


def test_metrics() -> None:
    """Values and standard errors have names of their own; an unknown standard error has none."""
    assert task_metrics(RESULTS) == {
        "tasks/gsm8k/exact_match,strict-match": 0.25,
        "tasks/gsm8k/exact_match,strict-match/stderr": 0.012,
        "tasks/gsm8k/exact_match,flexible-extract": 0.5,
        "tasks/both/acc": 1.0,
        "tasks/both/acc/stderr": 0.0,
    }


def test_report() -> None:
    """Columns are aligned, unknown figures are dashes, and warnings are counted with the first of them in full."""
    assert task_report({**RESULTS, "warnings": ["a b", "c"]}).splitlines() == [
        "task   metric                         value  stderr  questions  shots",
        "gsm8k  exact_match,strict-match      0.2500  0.0120      1,319      5",
        "gsm8k  exact_match,flexible-extract  0.5000       -      1,319      5",
        "both   acc                           1.0000  0.0000         81      -",
        "warnings of the harness: 2, the first: a b",
    ]
