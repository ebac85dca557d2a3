"""Uniform random choices of an exact size: what any choice by scores must beat.

They depend on nothing but their arguments, and leave torch's global generator alone. Weights are drawn in memory of one
tensor at a time beside the masks.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from math import prod

import numpy as np
import torch
from jaxtyping import Bool, Int, Int32
from torch import Tensor

from dualsft.allocators.base import DataAllocator, ParameterAllocator, ScoredExamples, ScoredParameters
from dualsft.allocators.threshold import BLOCK, Threshold, bracket, kth_largest, mark

_STREAM = 0x72616E64
"""Another stream of random numbers than those of a warm-up and a prior, which draw from the same rows by one seed."""
_LOWEST, _HIGHEST = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
_NONE = Threshold(np.int32(_HIGHEST), ties=0, all_ties=False)
_SAMPLED = 8
"""Blocks that say how large the last key is that is drawn: a million keys, which are in no order."""


class RandomExamples(DataAllocator):
    """Random examples, uniformly without replacement: the control of every data selection.

    Args:
        seed: Another seed draws other examples.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def allocate(self, examples: ScoredExamples, budget: int) -> Int[Tensor, " chosen"]:
        """Exactly ``budget`` examples; see `DataAllocator.allocate`."""
        return torch.tensor(random_examples(examples.example_id.tolist(), budget, self.seed))


class RandomWeights(ParameterAllocator):
    """Random weights, uniformly over the whole model without replacement: the control of every sparse fine-tune.

    Args:
        seed: Another seed draws other weights.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def allocate(self, scores: ScoredParameters, budget: int) -> dict[str, Bool[Tensor, "..."]]:
        """Exactly ``budget`` entries; see `ParameterAllocator.allocate`."""
        return random_weights(scores, budget, self.seed)


def random_examples(ids: Sequence[int], count: int, seed: int) -> list[int]:
    """Draw ``count`` different examples, all equally likely; ascending.

    Raises:
        ValueError: if there are fewer.
    """
    if not 0 <= count <= len(ids):
        raise ValueError(f"cannot choose {count} of {len(ids)} examples")
    order = torch.randperm(len(ids), generator=_generator(seed))
    return sorted(ids[k] for k in order[:count].tolist())


def random_weights(like: Mapping[str, Tensor], count: int, seed: int) -> dict[str, Bool[Tensor, "..."]]:
    """Draw ``count`` weights, each set of them equally likely.

    Args:
        like: Parameter name -> a tensor of its shape; its entries are not read.
        count: How many weights to draw.
        seed: Decides the draw.

    Raises:
        ValueError: if there are fewer.
    """
    shapes = {name: like[name].shape for name in sorted(like)}
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    drawn = draw_entries(sizes, count, _generator(seed))
    return {name: drawn[name].view(shape) for name, shape in shapes.items()}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed ^ _STREAM)


def draw_entries(sizes: Mapping[str, int], count: int, generator: torch.Generator) -> dict[str, Bool[Tensor, " entry"]]:
    """Draw ``count`` entries of tensors of these sizes: those with the largest of independent uniform random keys.

    Keys are made anew in each sweep instead of kept. This is uniform but for ties at the threshold, which go to the
    first: less than one entry is expected to tie in a model of less than 2³² weights. Splitting the count over the
    tensors first would need a hypergeometric law of more than the 10⁹ items that numpy can take.
    """
    state = generator.get_state()
    drawn = {name: torch.zeros(size, dtype=torch.bool) for name, size in sizes.items()}

    def sweep() -> Iterator[Int32[np.ndarray, " entry"]]:
        generator.set_state(state)
        for size in sizes.values():
            for first in range(0, size, BLOCK):
                part = (min(BLOCK, size - first),)
                yield torch.randint(_LOWEST, _HIGHEST + 1, part, dtype=torch.int32, generator=generator).numpy()

    threshold = _NONE
    if count:
        if count > (available := sum(sizes.values())):
            raise ValueError(f"cannot choose {count} of {available}")
        within = bracket(np.concatenate(list(islice(sweep(), _SAMPLED))), count, available)
        threshold = kth_largest(lambda: ((keys, None) for keys in sweep()), count, within)
    parts = (mask.numpy()[first : first + BLOCK] for mask in drawn.values() for first in range(0, len(mask), BLOCK))
    left = threshold.ties
    for keys, part in zip(sweep(), parts, strict=True):
        left -= mark(part, keys, threshold, left)
    return drawn
