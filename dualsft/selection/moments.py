"""Adam's second moment beside a ready scoring checkpoint."""

import hashlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dualsft.errors import UserError
from dualsft.models.loading import model_fingerprint, model_folder
from dualsft.sharding.shards import shard_of

SECOND_MOMENT = "second_moment.safetensors"
Moments = dict[str, Tensor]
"""Parameter name -> ĉ, the bias-corrected second moment."""


def second_moment_file(checkpoint: str) -> Path:
    """The file of ĉ beside a ready scoring checkpoint.

    Raises:
        UserError: if there is none.
    """
    path = model_folder(checkpoint) / SECOND_MOMENT
    if not path.is_file():
        raise UserError(
            f"The preconditioner adam and the scorer diagonal_fisher need a second moment, but {checkpoint} has no "
            f"{SECOND_MOMENT}; make the checkpoint with model.warmup.keep, set model.preconditioner to none, or take "
            "diagonal_fisher's source empirical_fisher."
        )
    return path


def stored_second_moment(checkpoint: str, model: nn.Module) -> Moments:
    """ĉ beside a ready scoring checkpoint, on the host, in its file until it is used; of a sharded model its shard.

    Raises:
        UserError: if there is none, it cannot be read, or it belongs to another model.
    """
    path = second_moment_file(checkpoint)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    try:
        moments = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if {n: m.shape for n, m in moments.items()} != {n: w.shape for n, w in weights.items()}:
        raise UserError(f"{path} belongs to another model: its parameters are not those of {checkpoint}.")
    return {name: shard_of(moment, weights[name]) for name, moment in moments.items()}


def describe_checkpoint(checkpoint: str) -> dict[str, str | None]:
    """Fingerprints of a ready scoring checkpoint: SHA-256 of its weights and of its second moment's file, if any."""
    path, digest = model_folder(checkpoint) / SECOND_MOMENT, None
    if path.is_file():
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"fingerprint": model_fingerprint(checkpoint), "second_moment": digest}
