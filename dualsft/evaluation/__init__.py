"""Evaluation of any checkpoint: `dualsft validate`, and the validation within a fit.

In: a causal language model, and validation sets or names of ready-made tasks. Out: loss, perplexity, token accuracy and
exact match of each set and their means, and the tasks' own metrics.
"""

from dualsft.evaluation.generation import Generation
from dualsft.evaluation.metrics import (
    ExactMatch,
    LanguageModelMetrics,
    ValidationMetrics,
    check_validation_data,
    validation_names,
)
from dualsft.evaluation.module import EvaluationModule
from dualsft.evaluation.task_scores import TaskScore, task_metrics, task_report, task_scores
from dualsft.evaluation.tasks import TaskOptions, load_tasks

__all__ = [
    "EvaluationModule",
    "ExactMatch",
    "Generation",
    "LanguageModelMetrics",
    "TaskOptions",
    "TaskScore",
    "ValidationMetrics",
    "check_validation_data",
    "load_tasks",
    "task_metrics",
    "task_report",
    "task_scores",
    "validation_names",
]
