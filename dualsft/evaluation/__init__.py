"""Evaluation of any checkpoint: loss, perplexity, token accuracy and exact match on any data, and ready-made tasks."""

from dualsft.evaluation.generation import Generation
from dualsft.evaluation.harness import TaskOptions, load_tasks
from dualsft.evaluation.metrics import ExactMatch, LanguageModelMetrics
from dualsft.evaluation.module import EvaluationModule
from dualsft.evaluation.sets import ValidationMetrics, check_validation_data, validation_names
from dualsft.evaluation.task_scores import TaskScore, task_metrics, task_report, task_scores

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
