"""Normalisations of the examples' scores: what a score is counted per.

    tokens           φ_i T_i              the fall of the loss summed over the T_i supervised tokens, not of their mean
    gradient_norm    φ_i / ‖P ⊙ g_i‖      the cosine of the example's step and u, but for a common factor
    length           φ_i T_i              the same along a path
    initial_loss     φ_i / l_i(θ_0)       the share of the loss that falls
    smoothed_loss    φ_i T_i / (L_i + L̄)  that share, L_i = T_i l_i(θ_0) being the example's whole loss at the start, L̄
                                          the mean of L_i: an example that hardly has any loss has no large share

<u, g_i> is of the mean loss of a token. The gradient of a mean over few tokens is long, so short examples have the
widest scores, and crowd both ends of the ranking.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar

from torch import Tensor

Normalize = Literal["none", "tokens", "gradient_norm"]


Factors = Mapping[int, float]
"""Example id -> the factor of its rows, and of its tokens' contributions."""
Value = TypeVar("Value", float, Tensor)


def token_counts(ids: Collection[int], num_tokens: Sequence[int] | Any) -> Factors:
    """T_i of these examples."""
    return {i: float(num_tokens[i]) for i in ids}


def inverses(ids: Collection[int], values: Mapping[int, Any]) -> Factors:
    """One over a number of each example that is not negative; 0 where that is zero, as then φ_i is."""
    return {i: 1 / value if (value := float(values[i])) else 0.0 for i in ids}


def smoothed_shares(ids: Collection[int], losses: Mapping[int, float], num_tokens: Sequence[int] | Any) -> Factors:
    """T_i / (L_i + L̄) with L_i = T_i l_i and L̄ their mean over these examples; 0 where all are zero."""
    counts = token_counts(ids, num_tokens)
    whole = {i: counts[i] * losses[i] for i in ids}
    mean = math.fsum(whole.values()) / len(whole)
    return {i: counts[i] / (whole[i] + mean) if mean else 0.0 for i in ids}


def scaled(values: Mapping[int, Value], factors: Factors) -> dict[int, Value]:
    """Values by example id, each times its factor."""
    return {i: value * factors[i] for i, value in values.items()}
