"""Draws the examples and the weights of a variant of a selection: a band of the ranking, blocks, or a mixture.

All draws have an exact size, depend on nothing but their arguments, and leave torch's global generator alone. Weights
are drawn in memory of one tensor at a time beside the masks.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dualsft.allocators.choice import Choice
from dualsft.allocators.random import draw_entries

Block = Literal["module", "row"]
"""What `random_blocks` draws: whole tensors, or the rows of matrices and whole vectors."""


def band_of_examples(scores: Mapping[int, float], count: int, band: int, bands: int) -> list[int]:
    """Take one of several bands of the ranking by score, each of ``count`` examples.

    Bands overlap, or leave gaps, where ``bands * count`` is not the number of examples: all have the budget's size.
    With a budget of a tenth, ten bands are the deciles.

    Args:
        scores: Example id -> φ_i. Ties go to the lower id.
        count: The size of a band.
        band: From 0, the highest scores, to ``bands - 1``, the lowest.
        bands: The number of bands, at least two.

    Returns:
        Example ids, ascending.

    Raises:
        ValueError: if there is no such band, or there are fewer examples than a band takes.
    """
    first = _first_rank(len(scores), count, band, bands)
    ranking = sorted(scores, key=lambda i: (-scores[i], i))
    return sorted(ranking[first : first + count])


def band_of_weights(
    scores: Mapping[str, Float[Tensor, "..."]], count: int, band: int, bands: int
) -> dict[str, Bool[Tensor, "..."]]:
    """Take one of several bands of the ranking by |φ|, each of ``count`` weights; see `band_of_examples`.

    Ties go to the first name, then the first flat index.
    """
    first = _first_rank(sum(score.numel() for score in scores.values()), count, band, bands)
    choice = Choice(scores, by="magnitude")
    choice.take(scores, first)
    higher = {name: mask.clone() for name, mask in choice.mask.items()}
    choice.take(scores, count)
    return {name: mask ^ higher.pop(name) for name, mask in choice.mask.items()}


def random_blocks(
    shapes: Mapping[str, Sequence[int]], count: int, seed: int, block: Block = "row"
) -> dict[str, Bool[Tensor, "..."]]:
    """Draw blocks of weights in random order until exactly ``count`` weights are taken.

    Single weights drawn at random all have nearly the same predicted sum; unions of blocks differ in theirs.

    Args:
        shapes: Parameter name -> its shape.
        count: How many weights to take. Of the last block, it is a run of entries from a random place.
        seed: Decides the order, in which all blocks are equally likely, whatever their size.
        block: ``module`` takes whole tensors; ``row`` slices of a tensor's last axis, and whole vectors.

    Raises:
        ValueError: if there are fewer weights.
    """
    names, generator = sorted(shapes), _generator(seed)
    lengths = [_block_length(shapes[name], block) for name in names]
    numbers = [prod(shapes[name]) // length for name, length in zip(names, lengths, strict=True)]
    sizes = torch.tensor(lengths).repeat_interleave(torch.tensor(numbers))
    if not 0 <= count <= int(sizes.sum()):
        raise ValueError(f"cannot choose {count} of {int(sizes.sum())} weights")
    order = torch.randperm(len(sizes), generator=generator)
    filled = sizes[order].cumsum(0)
    whole = int((filled <= count).sum())
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    chosen[order[:whole]] = True
    flat = [part.repeat_interleave(length) for part, length in zip(chosen.split(numbers), lengths, strict=True)]
    if left := count - (int(filled[whole - 1]) if whole else 0):
        tensor, row = _place(numbers, int(order[whole]))
        room = lengths[tensor] - left
        start = row * lengths[tensor] + int(torch.randint(room + 1, (), generator=generator))
        flat[tensor][start : start + left] = True
    return {name: part.view(tuple(shapes[name])) for name, part in zip(names, flat, strict=True)}


def mixture(mask: Mapping[str, Bool[Tensor, "..."]], share: float, seed: int) -> dict[str, Bool[Tensor, "..."]]:
    """Replace a part of a mask's weights by as many random ones from outside of it.

    Args:
        mask: Parameter name -> which weights are chosen.
        share: The share of the chosen weights that stay, from 0 to 1; which ones is drawn too.
        seed: Decides both draws.

    Raises:
        ValueError: if there are fewer weights outside of the mask than are to be replaced.
    """
    generator = _generator(seed)
    inside = {name: int(mask[name].sum()) for name in sorted(mask)}
    outside = {name: mask[name].numel() - size for name, size in inside.items()}
    count = sum(inside.values())
    kept = round(share * count)
    stays, comes = draw_entries(inside, kept, generator), draw_entries(outside, count - kept, generator)
    mixed = {}
    for name in inside:
        chosen = mask[name]
        mixed[name] = torch.empty_like(chosen)
        mixed[name][chosen], mixed[name][~chosen] = stays.pop(name), comes.pop(name)
    return mixed


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _first_rank(available: int, count: int, band: int, bands: int) -> int:
    """The rank at which a band starts: the first of `bands` evenly spaced ones at 0, the last at the lowest score."""
    if not (0 <= band < bands and bands >= 2 and 0 <= count <= available):
        raise ValueError(f"there is no band {band} of {bands} with {count} of {available}")
    return round(band * (available - count) / (bands - 1))


def _block_length(shape: Sequence[int], block: Block) -> int:
    """The entries of one block of a tensor; at least one, so that a tensor without entries has no blocks."""
    return max(1, shape[-1] if block == "row" and len(shape) > 1 else prod(shape))


def _place(numbers: Sequence[int], block: int) -> tuple[int, int]:
    """The tensor that a block is in, and its number in that tensor; blocks are numbered across all tensors."""
    ends = list(accumulate(numbers))
    tensor = next(k for k, end in enumerate(ends) if block < end)
    return tensor, block - ends[tensor] + numbers[tensor]
