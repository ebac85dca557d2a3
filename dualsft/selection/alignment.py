"""Cosines of directions in weight space, from what the passes have left in memory or in files.

    cos(a, b) = <a, b> / (‖a‖ ‖b‖)

over all weights of all ranks; no pass over data is made.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from dualsft.sharding.collectives import sum_of_shards

_CHUNK = 2**20
"""Entries that are looked at together; they take 24 MiB in float64."""


@torch.no_grad()
def cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float | None:
    """Compute the cosine of two vectors over the weights, one parameter at a time; None where either is zero.

    Args:
        one: Parameter name -> entries, of a sharded model this rank's shard; each tensor may be made when it is read.
        other: The same names and shapes, on any device.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for name in one:
        sums += _products(one[name].flatten(), other[name].flatten())
    product, square, other_square = sum_of_shards(sums).tolist()
    length = math.sqrt(square) * math.sqrt(other_square)
    return max(-1.0, min(1.0, product / length)) if length > 0 else None


def _products(one: Float[Tensor, " weight"], other: Float[Tensor, " weight"]) -> Float[Tensor, " product"]:
    """<a, b>, <a, a> and <b, b> of a parameter, in float64, a chunk at a time."""
    found = torch.zeros(3, dtype=torch.float64)
    for first in range(0, len(one), _CHUNK):
        a = one[first : first + _CHUNK].double()
        b = other[first : first + _CHUNK].to(a.device).double()
        found += torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]).cpu()
    return found
