"""Draws the examples and the weights of a variant of a selection: at random, or a band of the ranking by score.

All draws have an exact size, depend on nothing but their arguments, and leave torch's global generator alone. Weights
are drawn in memory of one tensor at a time beside the masks.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dualsft.allocators.choice import Choice, kth_largest

Block = Literal["module", "row"]
"""What `random_blocks` draws: whole tensors, or the rows of matrices and whole vectors."""

_LOWEST, _HIGHEST = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max


def random_examples(ids: Sequence[int], count: int, seed: int) -> list[int]:
    """Draw ``count`` different examples, all equally likely; ascending.

    Raises:
        ValueError: if there are fewer.
    """
    if not 0 <= count <= len(ids):
        raise ValueError(f"cannot choose {count} of {len(ids)} examples")
    order = torch.randperm(len(ids), generator=_generator(seed))
    return sorted(ids[k] for k in order[:count].tolist())


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


def random_weights(like: Mapping[str, Bool[Tensor, "..."]], count: int, seed: int) -> dict[str, Bool[Tensor, "..."]]:
    """Draw ``count`` weights, each set of them equally likely.

    Args:
        like: Parameter name -> a mask of its shape; its entries are not read.
        count: How many weights to draw.
        seed: Decides the draw.

    Raises:
        ValueError: if there are fewer.
    """
    shapes = {name: like[name].shape for name in sorted(like)}
    drawn = _draw({name: prod(shape) for name, shape in shapes.items()}, count, _generator(seed))
    return {name: drawn[name].view(shape) for name, shape in shapes.items()}


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
    stays, comes = _draw(inside, kept, generator), _draw(outside, count - kept, generator)
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


def _draw(sizes: Mapping[str, int], count: int, generator: torch.Generator) -> dict[str, Bool[Tensor, " entry"]]:
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


def _block_length(shape: Sequence[int], block: Block) -> int:
    """The entries of one block of a tensor; at least one, so that a tensor without entries has no blocks."""
    return max(1, shape[-1] if block == "row" and len(shape) > 1 else prod(shape))


def _place(numbers: Sequence[int], block: int) -> tuple[int, int]:
    """The tensor that a block is in, and its number in that tensor; blocks are numbered across all tensors."""
    ends = list(accumulate(numbers))
    tensor = next(k for k, end in enumerate(ends) if block < end)
    return tensor, block - ends[tensor] + numbers[tensor]
