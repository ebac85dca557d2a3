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
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from torch import Tensor

from dualsft.matrix.example_values import ExampleIds, ExampleValues

Normalize = Literal["none", "tokens", "gradient_norm"]


Factors = ExampleValues
"""Example id -> the factor of its rows, and of its tokens' contributions."""


def token_counts(ids: ExampleIds, num_tokens: Int[np.ndarray, " row"]) -> Factors:
    """T_i of these examples."""
    return ExampleValues(ids, num_tokens[ids])


def inverses(ids: ExampleIds, values: Mapping[int, Any]) -> Factors:
    """One over a number of each example that is not negative; 0 where that is zero, as then φ_i is."""
    numbers = ExampleValues.of(values).at(ids)
    return ExampleValues(ids, np.divide(1.0, numbers, out=np.zeros(len(ids)), where=numbers != 0))


def smoothed_shares(ids: ExampleIds, losses: ExampleValues, num_tokens: Int[np.ndarray, " row"]) -> Factors:
    """T_i / (L_i + L̄) with L_i = T_i l_i and L̄ their mean over these examples; 0 where all are zero."""
    counts = token_counts(ids, num_tokens).numbers
    whole = counts * losses.at(ids)
    mean = math.fsum(whole.data) / len(whole)
    return ExampleValues(ids, counts / (whole + mean) if mean else np.zeros(len(ids)))


def scaled(values: ExampleValues, factors: Factors) -> ExampleValues:
    """Values by example id, each times its factor."""
    return ExampleValues(values.ids, values.numbers * factors.at(values.ids))


def scaled_tokens(tokens: Mapping[int, Tensor], factors: Factors) -> dict[int, Tensor]:
    """The contributions of tokens by example id, each times its example's factor."""
    return {i: values * factors[i] for i, values in tokens.items()}
