"""Controls for a selection: examples and weights drawn at random in the same numbers, or all of them."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dualsft.data.records import read_records
from dualsft.selection import Selection
from dualsft.selection.variants import write_variant

Draw = Literal["chosen", "random", "all"]
"""What to keep of one side: what was chosen, as many at random, or everything."""


def write_control(
    selection: Selection, pool: Path, folder: Path, seed: int, *, examples: Draw, weights: Draw
) -> Selection:
    """Write a selection that differs from another only in its choices.

    Args:
        selection: The selection whose scores and sizes to keep.
        pool: The records it chose from.
        folder: Folder to write the control to.
        seed: Decides random draws.
        examples: Which of the scored examples to choose.
        weights: Which weights to choose.
    """
    generator = torch.Generator().manual_seed(seed + 2)  # the warm-up draws with the seed, a prior with the next one
    chosen = _draw_examples(selection, examples, generator)
    mask = selection.mask()
    if weights == "random":
        mask = random_mask(mask, generator)
    elif weights == "all":
        mask = {name: torch.ones_like(m) for name, m in mask.items()}
    about = {"examples": examples, "weights": weights}
    return write_variant(selection, read_records(str(pool)), folder, examples=chosen, mask=mask, about=about)


def random_mask(like: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """A random mask with as many entries as another, uniform over all weights."""
    sizes = [mask.numel() for mask in like.values()]
    count = sum(int(mask.sum()) for mask in like.values())
    flat = torch.zeros(sum(sizes), dtype=torch.bool)
    flat[torch.randperm(len(flat), generator=generator)[:count]] = True
    parts = flat.split(sizes)
    return {name: part.view(mask.shape) for (name, mask), part in zip(like.items(), parts, strict=True)}


def _draw_examples(selection: Selection, draw: Draw, generator: torch.Generator) -> list[int]:
    table = selection.examples.to_pydict()
    scored = [i for i, status in zip(table["example_id"], table["status"], strict=True) if status == "ok"]
    if draw == "all":
        return scored
    if draw == "chosen":
        return selection.example_ids
    order = torch.randperm(len(scored), generator=generator)[: len(selection.example_ids)]
    return [scored[k] for k in order.tolist()]
