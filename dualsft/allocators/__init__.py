"""Allocators: rules that choose weights and examples by their scores, under a budget.

In: the scores φ_j of the weights or φ_i of the examples, and a budget. Out: masks, or the chosen example ids.
"""

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
from dualsft.allocators.diverse import Diverse
from dualsft.allocators.layer_quota import LayerQuota
from dualsft.allocators.per_source_quota import PerSourceQuota
from dualsft.allocators.positive_only import PositiveOnly
from dualsft.allocators.proportional import Proportional
from dualsft.allocators.random import RandomExamples, RandomWeights
from dualsft.allocators.structured import Structured
from dualsft.allocators.token_budget import TokenBudget
from dualsft.allocators.top_k import GlobalTopK, TopK
from dualsft.allocators.uniform_per_layer import UniformPerLayer

__all__ = [
    "Budget",
    "DataAllocator",
    "Diverse",
    "ExampleStatistic",
    "GlobalTopK",
    "LayerQuota",
    "ParameterAllocator",
    "ParameterStatistic",
    "PerSourceQuota",
    "PositiveOnly",
    "Proportional",
    "RandomExamples",
    "RandomWeights",
    "ScoredExamples",
    "ScoredParameters",
    "Structured",
    "TokenBudget",
    "TopK",
    "UniformPerLayer",
    "check_budget",
    "count_of",
]
