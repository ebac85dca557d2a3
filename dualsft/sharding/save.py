"""Saving a sharded model: the files that `save_pretrained` writes of the unsharded model, byte for byte.

The library plans which tensors go into which file and under which name, with lazy tensors
(`dualsft.sharding.lazy_tensor`). The ranks write the files together, and fail together (`dualsft.sharding.files`).
"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from torch import Tensor

from dualsft.models import PreTrainedModel
from dualsft.models.tensor_file import TensorSpec, file_order, write_tensors
from dualsft.sharding.collectives import on_all_ranks
from dualsft.sharding.files import METADATA, lazy_full_tensors, write_files
from dualsft.sharding.groups import rank, world_size
from dualsft.sharding.shards import full_tensor, local_shard
from dualsft.storage.writing import writing_to

_MAX_FILE, _MIN_FILE = 50 * 10**9, 10**9
"""Bytes: the largest file, as in `save_pretrained`, and the smallest that a model is divided into between ranks."""


def save_sharded(model: PreTrainedModel, folder: Path) -> None:
    """Write a model, of which the ranks hold shards or replicas, as a Hugging Face folder; every rank calls this.

    Each rank writes about as much, and holds no more of the model at a time than the files that it writes.
    """
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    per_file = min(_MAX_FILE, max(_MIN_FILE, -(-size // world_size())))
    write_files(folder, plan_files(model, folder, lazy_state(model), per_file))


def plan_files(
    model: PreTrainedModel, folder: Path, state: Mapping[str, Tensor] | None = None, per_file: int = _MAX_FILE
) -> list[tuple[str, Mapping[str, Tensor], Mapping[str, str]]]:
    """Let `save_pretrained` write all but the weights; return name, tensors and metadata of the files it would write.

    Args:
        model: The model, sharded or not; every rank calls this for a sharded one.
        folder: Where rank zero writes the configuration.
        state: The model's state dict, if it is not its own; its tensors may be lazy.
        per_file: Largest file in bytes.
    """
    files: list[tuple[str, Mapping[str, Tensor], Mapping[str, str]]] = []

    def plan_file(tensors: Mapping[str, Tensor], path: str, metadata: Mapping[str, str] | None = None) -> None:
        files.append((Path(path).name, tensors, metadata or {}))

    # newer releases of the library save on rank zero alone
    on_every_rank = mock.patch.object(model, "should_save_on_this_rank", return_value=True, create=True)
    planning = mock.patch("transformers.modeling_utils.safe_save_file", plan_file)
    with TemporaryDirectory() as unused, on_every_rank, planning:
        # every rank plans the same files; rank zero alone writes the configuration beside them
        target = folder if rank() == 0 else Path(unused)
        written = None if state is None else dict(state)

        def plan() -> None:
            with writing_to(folder):
                model.save_pretrained(target, state_dict=written, max_shard_size=per_file)

        on_all_ranks(plan)
    return files


def lazy_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's state dict with lazy full parameters, tied weights once."""
    parameters = dict(model.named_parameters())
    shards = {name: local_shard(parameter.detach()) for name, parameter in parameters.items()}
    lazy = lazy_full_tensors(shards, parameters)
    return {name: lazy.get(name, value) for name, value in untied_state(model).items()}


def untied_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's state dict with tied weights once, which the library cannot tell by their memory on the meta device."""
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def write_shards(shards: Mapping[str, Tensor], like: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors, sharded or not, into one safetensors file with a checksum, as `write_tensors` does.

    Every rank calls this, and memory holds one full tensor.
    """
    specs = {name: TensorSpec(shard.dtype, tuple(like[name].shape)) for name, shard in shards.items()}
    gathered = (full_tensor(shards[name], like[name]) for name in file_order(specs))

    def write() -> None:
        try:
            if rank() == 0:
                with writing_to(path.parent):
                    write_tensors(path, specs, lambda _: next(gathered), METADATA, checksum=True)
        finally:  # the other ranks take part, and so does rank zero if the file cannot be written
            for _ in gathered:
                pass

    on_all_ranks(write)
