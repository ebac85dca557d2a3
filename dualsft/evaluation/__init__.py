"""Evaluation of any checkpoint on any data: loss, perplexity, token accuracy, exact match of generated answers."""

from dualsft.evaluation.generation import Generation
from dualsft.evaluation.metrics import ExactMatch, LanguageModelMetrics
from dualsft.evaluation.module import EvaluationModule, check_validation_data

__all__ = ["EvaluationModule", "ExactMatch", "Generation", "LanguageModelMetrics", "check_validation_data"]
