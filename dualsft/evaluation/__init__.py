"""Evaluation of any checkpoint on any data: loss, perplexity, token accuracy, exact match of generated answers."""

from dualsft.evaluation.generation import Generation
from dualsft.evaluation.metrics import ExactMatch, LanguageModelMetrics
from dualsft.evaluation.module import EvaluationModule
from dualsft.evaluation.sets import ValidationMetrics, check_validation_data, validation_names

__all__ = [
    "EvaluationModule",
    "ExactMatch",
    "Generation",
    "LanguageModelMetrics",
    "ValidationMetrics",
    "check_validation_data",
    "validation_names",
]
