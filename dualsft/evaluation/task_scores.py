"""The scores in the results of the lm-evaluation-harness: for a table, and for `metrics.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task or group.

    Attributes:
        task: Its name.
        metric: The metric's name; for answers that went through a named filter, with a comma and the filter's name.
        value: The measured value.
        stderr: Standard error of the value; None where the harness gives none.
        questions: The number of questions that the value is over.
        few_shot: Examples shown before each; None where the harness does not say.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    questions: int
    few_shot: int | None


def task_scores(results: Mapping[str, Any]) -> list[TaskScore]:
    """All metrics of all tasks and groups, in the harness's order."""
    scores = []
    for task, measured in results["results"].items():
        of_group = measured.get("sample_count", {})  # a group's metric may be of some of its tasks
        for key, value in measured.items():
            metric, _, answer_filter = key.partition(",")
            if answer_filter and not metric.endswith("_stderr"):
                name = metric if answer_filter == "none" else key
                stderr = measured.get(f"{metric}_stderr,{answer_filter}")
                stderr = float(stderr) if isinstance(stderr, (int, float)) else None
                questions = int(of_group.get(key, measured["sample_len"]))
                scores.append(TaskScore(task, name, float(value), stderr, questions, results["n-shot"].get(task)))
    return scores


def task_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """The scores as entries of `metrics.json`: ``tasks/TASK/METRIC[/stderr]``, unlike any validation set's name."""
    metrics = {}
    for score in task_scores(results):
        name = f"tasks/{score.task}/{score.metric}"
        metrics[name] = score.value
        if score.stderr is not None:
            metrics[f"{name}/stderr"] = score.stderr
    return metrics


def task_report(results: Mapping[str, Any]) -> str:
    """A table with one line per metric, and the harness's warnings."""
    rows = [("task", "metric", "value", "stderr", "questions", "shots"), *map(_row, task_scores(results))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(_cells(row, widths)) for row in rows]
    if warnings := results["warnings"]:
        lines.append(f"warnings of the harness: {len(warnings):,}, the first: {warnings[0]}")
    return "\n".join(lines)


def _row(score: TaskScore) -> tuple[str, ...]:
    stderr = "-" if score.stderr is None else f"{score.stderr:.4f}"
    shots = "-" if score.few_shot is None else str(score.few_shot)
    return score.task, score.metric, f"{score.value:.4f}", stderr, f"{score.questions:,}", shots


def _cells(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Align words to the left, numbers to the right."""
    return [f"{cell:<{w}}" if i < 2 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
