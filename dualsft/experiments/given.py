"""Allocators that choose what they are given, so that one side is scored by a choice that was made elsewhere."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dualsft.allocators import DataAllocator, ParameterAllocator, ScoredExamples
from dualsft.errors import UserError
from dualsft.selection import load_selection


class GivenExamples(DataAllocator):
    """These examples, those among them that have no finite score left out, whatever the scores and the budget.

    Args:
        ids: Their row numbers in the pool.
    """

    exact = False

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def allocate(self, examples: ScoredExamples, budget: int) -> Int[Tensor, " chosen"]:
        """The given ones of the examples; see `DataAllocator.allocate`."""
        return examples.example_id[torch.isin(examples.example_id, torch.tensor(self.ids))]


class GivenWeights(ParameterAllocator):
    """The weights that a selection chose, whatever the scores.

    Args:
        selection: The selection directory.
        checksum: The checksum of its mask, so that equal settings mean equal masks.

    Raises:
        UserError: if the selection's mask is another one.
    """

    def __init__(self, selection: str, checksum: str) -> None:
        self.selection, self.checksum = selection, checksum

    def allocate(self, scores: Mapping[str, Float[Tensor, "..."]], budget: int) -> Mapping[str, Bool[Tensor, "..."]]:
        """The selection's mask; see `ParameterAllocator.allocate`."""
        selection = load_selection(self.selection)
        if (selection.about.checksums or {}).get("mask.safetensors") != self.checksum:
            raise UserError(f"{self.selection} has another mask than the one that was asked for; audit it anew.")
        mask = selection.stored_masks()
        return {name: mask[name] for name in scores}
