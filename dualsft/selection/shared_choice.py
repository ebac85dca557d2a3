"""Choices by the scores of a sharded model: its ranks write them, one of them chooses, and all read what it chose.

The rule that spends a budget is anybody's, and is given all scores at once: it is asked on the first rank, whose host
holds them meanwhile, as that of a single process does.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from dualsft.selection.choosing import WeightChoice, choose_weights
from dualsft.selection.mask import StoredMasks, write_masks
from dualsft.sharding.collectives import on_rank_zero
from dualsft.sharding.files import read_full_tensors, write_full_tensors

_SCORES, _MASK = "scores", "mask.safetensors"


def choose_together(
    how: WeightChoice, scores: Mapping[str, Tensor], model: nn.Module, folder: Path
) -> Mapping[str, Tensor]:
    """Parameter name -> which weights are chosen, of the parameter's whole shape; on every rank.

    Args:
        how: The rule and its budget.
        scores: Parameter name -> this rank's shard of φ_j, float32.
        model: The sharded model.
        folder: An empty folder that the ranks share.

    Raises:
        UserError: on every rank, if the budget cannot be met, or the allocator does not keep to it.
    """
    write_full_tensors(scores, dict(model.named_parameters()), folder, _SCORES)
    on_rank_zero(lambda: write_masks(folder / _MASK, choose_weights(how, read_full_tensors(folder, _SCORES))))
    return StoredMasks(folder / _MASK)
