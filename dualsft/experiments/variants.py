"""Variants of a selection: the examples and the weights that a job trains in place of those that it chose."""

from pathlib import Path
from typing import Literal, TypedDict

import torch
from torch import Tensor

from dualsft.allocators.random import random_examples, random_weights
from dualsft.data.records import read_records
from dualsft.data.sources import Given
from dualsft.errors import UserError
from dualsft.experiments.draws import (
    band_of_examples,
    band_of_weights,
    mixture,
    random_blocks,
)
from dualsft.selection import Selection, load_selection
from dualsft.selection.parameter_choice import trainable_names
from dualsft.selection.variants import write_variant

Rule = Literal["chosen", "all", "random", "band", "blocks", "mixture"]


class Draw(TypedDict, total=False):
    """How one side of a variant is drawn, as JSON.

    chosen and all take no options; random takes count and seed; band takes count, band and bands; blocks (of weights)
    count, block and seed; mixture (of weights) share and seed. Where `make_variant` is given no count, it is that of
    what the selection chose.
    """

    rule: Rule
    count: int
    seed: int
    band: int
    bands: int
    block: Literal["module", "row"]
    share: float


class Variant(TypedDict):
    """Both sides of a variant."""

    examples: Draw
    weights: Draw


def examples_of(selection: Selection, draw: Draw) -> list[int]:
    """The examples that a draw takes, ascending."""
    table = selection.examples.to_pydict()
    pairs = zip(table["example_id"], table["score"], table["status"], strict=True)
    scored = {i: score for i, score, status in pairs if status == "ok"}
    match draw["rule"]:
        case "chosen":
            return selection.example_ids
        case "all":
            return sorted(scored)
        case "random":
            return random_examples(list(scored), draw["count"], draw["seed"])
        case "band":
            return band_of_examples(scored, draw["count"], draw["band"], draw["bands"])
    raise UserError(f"Examples are not drawn by {draw['rule']!r}.")


def weights_of(selection: Selection, draw: Draw) -> dict[str, Tensor]:
    """The mask that a draw takes."""
    whole = selection.mask()
    if draw["rule"] == "chosen":
        return whole
    settings = selection.about.settings
    names = trainable_names(settings["trainable"], settings["frozen"], whole)
    mask = {name: part for name, part in whole.items() if name in names}
    drawn = _drawn_weights(selection, mask, draw)
    return {name: drawn[name] if name in names else torch.zeros_like(part) for name, part in whole.items()}


def _drawn_weights(selection: Selection, mask: dict[str, Tensor], draw: Draw) -> dict[str, Tensor]:
    """A draw from the weights that may be trained, those of this mask."""
    match draw["rule"]:
        case "all":
            return {name: torch.ones_like(part) for name, part in mask.items()}
        case "random":
            return random_weights(mask, draw["count"], draw["seed"])
        case "band":
            scores = {name: score for name, score in selection.parameter_scores().items() if name in mask}
            return band_of_weights(scores, draw["count"], draw["band"], draw["bands"])
        case "blocks":
            shapes = {name: tuple(part.shape) for name, part in mask.items()}
            return random_blocks(shapes, draw["count"], draw["seed"], draw["block"])
        case "mixture":
            return mixture(mask, draw["share"], draw["seed"])
    raise UserError(f"Weights are not drawn by {draw['rule']!r}.")


def make_variant(selection: str, variant: Variant, folder: Path, pool: Given, split: str) -> None:
    """Write the variant of a selection into a new folder.

    Args:
        selection: The selection directory.
        variant: What is taken in place of what it chose.
        folder: The folder to make.
        pool: The sources of the records that it chose from.
        split: Their split, of those that are datasets of the hub.
    """
    source = load_selection(selection)
    counts = source.about.counts
    write_variant(
        source,
        read_records(pool, split),
        folder,
        examples=examples_of(source, {"count": counts.examples.selected, **variant["examples"]}),
        mask=weights_of(source, {"count": counts.parameters.selected, **variant["weights"]}),
        about=variant,
    )
