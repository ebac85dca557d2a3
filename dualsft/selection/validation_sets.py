"""Several validation sets at once: each has scores of its own, and a combination of them decides."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Combination = Literal["mean", "max", "min"]


def combined(values: Sequence[Float[Tensor, "*shape"]], combination: Combination) -> Float[Tensor, "*shape"]:
    """The sets' values of the same things as one: their mean, or the largest or smallest of each."""
    if len(values) == 1:
        return values[0]
    stacked = torch.stack(list(values))
    if combination == "mean":
        return stacked.mean(0)
    return stacked.amax(0) if combination == "max" else stacked.amin(0)


def combined_rows(rows: Sequence[Mapping[int, float]], combination: Combination) -> dict[int, float]:
    """Example id -> the sets' scores as one."""
    values = combined([torch.tensor(list(of.values()), dtype=torch.float64) for of in rows], combination)
    return dict(zip(rows[0], values.tolist(), strict=True))


def combined_tokens(
    tokens: Sequence[Mapping[int, Tensor]], rows: Sequence[Mapping[int, float]], combination: Combination
) -> dict[int, Tensor]:
    """Example id -> the contributions of its tokens to the combined score, which they add up to.

    Where the largest or the smallest score decides, they are those of the set that has it.
    """
    if not tokens:
        return {}
    if combination == "mean":
        return {i: torch.stack([of[i] for of in tokens]).mean(0) for i in tokens[0]}
    best = max if combination == "max" else min
    deciding = {i: [of[i] for of in rows].index(best(of[i] for of in rows)) for i in tokens[0]}
    return {i: tokens[k][i] for i, k in deciding.items()}
