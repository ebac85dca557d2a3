"""Uniform random choices of an exact size: what any choice by scores must beat.

They depend on nothing but their arguments, and leave torch's global generator alone. Weights are drawn in memory of one
tensor at a time beside the masks.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dualsft.allocators.base import DataAllocator, ParameterAllocator, ScoredExamples, ScoredParameters
from dualsft.allocators.choice import kth_largest

_STREAM = 0x72616E64
"""Another stream of random numbers than those of a warm-up and a prior, which draw from the same rows by one seed."""
_LOWEST, _HIGHEST = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max


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

    def sweep() -> Iterable[Int[Tensor, " entry"]]:
        generator.set_state(state)
        for size in sizes.values():
            yield torch.randint(_LOWEST, _HIGHEST + 1, (size,), dtype=torch.int32, generator=generator)

    threshold, ties = kth_largest(sweep, count) if count else (_HIGHEST, 0)
    drawn = {}
    for name, keys in zip(sizes, sweep(), strict=True):
        drawn[name] = keys > threshold
        at_threshold = (keys == threshold).nonzero().squeeze(1)[:ties]
        drawn[name][at_threshold] = True
        ties -= len(at_threshold)
    return drawn
