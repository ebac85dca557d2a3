"""The files of φ_j in a run: written once, chosen by, and linked into the selection that the run leaves."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dualsft.models import PreTrainedModel
from dualsft.runs.folder import RunFolder
from dualsft.selection.artifact import WEIGHT_SCORES
from dualsft.sharding.collectives import on_rank_zero
from dualsft.sharding.files import full_tensor_files, read_full_tensors, write_full_tensors
from dualsft.sharding.shards import local_shard
from dualsft.storage.paths import link_or_copy

_FOLDER, _SCORE = "scores", torch.float32


def write_weight_scores(
    run: RunFolder, model: PreTrainedModel, scores: Mapping[str, Tensor], replaces: Collection[str] = ()
) -> Path | None:
    """Write the scores of the weights into a folder of the run, in the place of those of an earlier scoring.

    Args:
        run: The run.
        model: The model, whose ranks write together if it is sharded.
        scores: Parameter name -> φ_j, float32, of a sharded model this rank's shards; each may be made when it is read,
            once.
        replaces: Names of states of the run that go first, if the disk has no room for both.

    Returns:
        The folder, None if no weight has a score.
    """
    if not scores:
        return None
    weights = dict(model.named_parameters())
    folder = run.staging(_FOLDER)
    run.make_room(sum(local_shard(weights[name].detach()).numel() for name in scores) * _SCORE.itemsize, replaces)
    write_full_tensors(scores, weights, folder, WEIGHT_SCORES, _SCORE)
    return folder


def read_weight_scores(folder: Path) -> Mapping[str, Tensor]:
    """Parameter name -> φ_j, of the full shape; each is read from its file when it is asked for.

    Every rank calls this. Rank zero names the files: a network drive may not list yet what another host has written.
    """
    return read_full_tensors(on_rank_zero(lambda: full_tensor_files(folder, WEIGHT_SCORES)))


def stored_weight_scores(run: RunFolder) -> Path:
    """The folder of the latest scores that the run has written."""
    return run.state_folder(_FOLDER)


def link_weight_scores(folder: Path, staged: Path) -> None:
    """Give the files of the scores a second name in a staged selection; where the disk has no links, copy them."""
    for path in folder.glob(f"{WEIGHT_SCORES}*"):
        link_or_copy(path, staged / path.name)
