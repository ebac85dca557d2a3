"""What it takes to choose weights by their scores, on the host, in time and not in processor time."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from choice import RULES, llama_scores

from gpu_checks.models import timed
from gpu_checks.section import Figure, Scale

_LAYERS, _PER_LAYER = 4, 11
"""A block of `llama_scores` has about so many times hidden² weights."""


def choosing(scale: Scale) -> Iterator[Figure]:
    """Nanoseconds for each weight, with a budget of a tenth."""
    hidden = int((scale.weights / (_LAYERS * (_PER_LAYER + 3.5))) ** 0.5) // 8 * 8
    scores: Any = llama_scores(hidden, _LAYERS, hidden * 4)
    weights = sum(score.numel() for score in scores.values())
    yield Figure("weights", weights)
    for name, rule in RULES.items():
        seconds = timed("cpu", partial(rule.allocate, scores, weights // 10))
        yield Figure(name, seconds / weights * 1e9, "ns for each weight")
