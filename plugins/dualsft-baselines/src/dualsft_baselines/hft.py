"""A random half of each layer's attention matrices, of its feed-forward matrices, and of its norms.

Source: Hui, Zhang, Wang, Xu, Sun, Wu, "HFT: Half Fine-Tuning for Large Language Models", arXiv 2404.18466 (2024). Of
three feed-forward matrices, half of the layers train two and the others one; embeddings and the head are trained.

For other budgets than the half, each of a block's m parameters gets the place (k + o) / m, with k its rank in a random
order and o an offset of the block, spread evenly over (0, 1) among the layers. Parameters are trained whole from the
lowest place on. Where the places end at 1/2, that is half of each block, and the paper's choice; there follow the
embeddings, the head and the last norm, before any of the other halves. The last parameter that the budget reaches is
trained in part.

What differs: the half is drawn once, where the paper draws it anew for each round of training.
"""

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from dualsft import ParameterAllocator, ScoredParameters
from dualsft_baselines.layers import block, in_a_layer
from dualsft_baselines.sampling import random_entries


class HalfFineTuning(ParameterAllocator):
    """Whole random matrices, as many of each layer's attention as of its feed-forward block (HFT, arXiv 2404.18466).

    The paper's choice is a budget of about 0.5: half of each layer, and the embeddings and the head.

    Args:
        seed: Another seed draws other matrices.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def allocate(self, scores: ScoredParameters, budget: int) -> dict[str, Tensor]:
        """Exactly ``budget`` entries: parameter name -> bool, of its shape."""
        generator = torch.Generator().manual_seed(self.seed)
        mask = {}
        for name in _order(scores, generator):
            size = scores[name].numel()
            mask[name] = random_entries(size, min(budget, size), generator).view(scores[name].shape)
            budget = max(0, budget - size)
        return mask


def _order(scores: Mapping[str, Tensor], generator: torch.Generator) -> list[str]:
    """The names in the order in which they are trained."""
    places = dict.fromkeys(scores, 0.5)
    for blocks in _blocks_by_kind(scores):
        offsets = (torch.randperm(len(blocks), generator=generator) + 0.5) / len(blocks)
        for names, offset in zip(blocks, offsets.tolist(), strict=True):
            ranks = torch.randperm(len(names), generator=generator).tolist()
            places |= {name: (rank + offset) / len(names) for name, rank in zip(names, ranks, strict=True)}
    return sorted(places, key=lambda name: (places[name], name))


def _blocks_by_kind(scores: Mapping[str, Tensor]) -> list[list[list[str]]]:
    """For each kind of block, as it recurs in the layers, the names in each; norms and biases are blocks apart."""
    kinds: dict[tuple[str, bool], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(filter(in_a_layer, scores)):
        path, matrix = block(name), scores[name].dim() > 1
        kinds[re.sub(r"\d+", "#", path), matrix][path].append(name)
    return [list(blocks.values()) for blocks in kinds.values()]
