"""Budgets on the two score vectors: how many weights and examples, and which."""

from dualsft.allocators.base import (
    Budget,
    DataAllocator,
    ExampleStatistic,
    ParameterAllocator,
    ParameterStatistic,
    ScoredExamples,
    ScoredParameters,
    check_budget,
    count_of,
)
from dualsft.allocators.top_k import GlobalTopK, TopK

__all__ = [
    "Budget",
    "DataAllocator",
    "ExampleStatistic",
    "GlobalTopK",
    "ParameterAllocator",
    "ParameterStatistic",
    "ScoredExamples",
    "ScoredParameters",
    "TopK",
    "check_budget",
    "count_of",
]
