"""How far the order of the scores rests on which validation rows there are.

Each half of the validation set has its own gradient v, direction u and scores; their rank correlation says how much of
the order another draw of as many rows as a half has would keep.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dualsft.matrix.example_values import ExampleValues
from dualsft.selection.diagnostics import Stability
from dualsft.selection.diagnostics.examples import rank_correlation
from dualsft.selection.directions import Combination, combined, combined_rows
from dualsft.sharding.collectives import gather_shards

T = TypeVar("T")
_SAMPLED = 2**20
"""About so many weights are compared of each shard, evenly spread over all."""


def agreement(
    rows: Sequence[ExampleValues],
    us: Sequence[Mapping[str, Tensor]],
    sums: Mapping[str, Tensor],
    combination: Combination,
) -> Stability:
    """Correlate the ranks that two halves give.

    Args:
        rows: Example id -> φ_i, by the first halves of all validation sets, then by the second ones.
        us: Parameter name -> u, likewise.
        sums: Parameter name -> Σ_i g_i.
        combination: How the sets' scores become one.
    """
    of_rows = [combined_rows(half, combination) for half in _halves(rows)]
    one, other = (of.at(np.sort(of_rows[0].ids)) for of in of_rows)
    weights = [_sample(half, sums, combination) for half in _halves(us)]
    return Stability(rank_correlation(one, other), rank_correlation(*weights))


def _halves(values: Sequence[T]) -> list[Sequence[T]]:
    return [values[: len(values) // 2], values[len(values) // 2 :]]


def _sample(
    us: Sequence[Mapping[str, Tensor]], sums: Mapping[str, Tensor], combination: Combination
) -> Float[np.ndarray, " weight"]:
    """φ_j of some weights of all ranks, the validation sets combined."""
    step = max(1, sum(total.numel() for total in sums.values()) // _SAMPLED)
    own = [combined([_every(u[name], sums[name], step) for u in us], combination) for name in us[0]]
    return np.concatenate([part.numpy() for part in gather_shards(torch.cat(own))])


def _every(u: Float[Tensor, "*shape"], sums: Float[Tensor, "*shape"], step: int) -> Float[Tensor, " weight"]:
    """φ_j of every ``step``-th weight of a parameter, on the host, in float64."""
    return u.flatten()[::step].cpu().double() * sums.flatten()[::step].cpu().double()
