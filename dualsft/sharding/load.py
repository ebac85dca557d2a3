"""Loads a model in shards: each rank reads and holds only its own rows of the weights.

The library loads the model as always, but from files that give lazy tensors (`dualsft.sharding.lazy_tensor`). They
record what the loader does to them (it renames, casts, and stacks the experts of a layer), and each rank then reads its
rows of the results.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dualsft.errors import UserError
from dualsft.models import PreTrainedModel
from dualsft.models.loading import Dtype, load_model, model_folder, reading_weights
from dualsft.sharding.collectives import on_all_ranks
from dualsft.sharding.lazy_tensor import LazyTensor, rows_of
from dualsft.sharding.shard_model import shard_model
from dualsft.sharding.shards import first_row, from_local, local_shard


def load_sharded(
    name_or_path: str, mesh: DeviceMesh, dtype: Dtype = "auto", cpu_offload: bool = False
) -> PreTrainedModel:
    """Load the model of `load_model`, sharded as by `shard_model`; no rank ever holds all of it.

    Every rank calls this, with the arguments of those two functions; every rank alike raises as they do.
    """
    folder = on_all_ranks(lambda: model_folder(name_or_path))
    model, weights, _ = on_all_ranks(lambda: lazy_model(folder, dtype))
    shard_model(model, mesh, cpu_offload)
    device = torch.device("cpu" if cpu_offload else mesh.device_type)
    on_all_ranks(lambda: _read_shards(model, weights, device, folder))
    return model


@torch.no_grad()
def copy_weights(model: PreTrainedModel, name_or_path: str) -> None:
    """Copy a checkpoint's weights into a model, one after another, each rank its own rows; every rank calls this.

    Raises:
        UserError: as `load_model` does, and if the checkpoint has other weights than the model.
    """
    folder = on_all_ranks(lambda: model_folder(name_or_path))
    _, weights, _ = on_all_ranks(lambda: lazy_model(folder))
    parameters = dict(model.named_parameters())
    if {n: w.shape for n, w in weights.items()} != {n: p.shape for n, p in parameters.items()}:
        raise UserError(f"{name_or_path} has other weights, by name or shape, than the model; give a checkpoint of it.")

    def copy() -> None:
        with reading_weights(folder):
            for name, parameter in parameters.items():
                start, shard = first_row(parameter), local_shard(parameter.detach())
                shard.copy_(rows_of(weights[name], slice(start, start + len(shard))))

    on_all_ranks(copy)


def lazy_model(folder: Path, dtype: Dtype = "auto") -> tuple[PreTrainedModel, dict[str, Tensor], set[str]]:
    """A model with its parameters on the meta device, lazy tensors of their values, and which tensors it takes.

    The last are names in the folder's files. Next to nothing is read.

    Raises:
        UserError: as `load_model` does.
    """
    taken: set[str] = set()
    with mock.patch("transformers.modeling_utils.safe_open", partial(_LazyFile, taken)):
        model = load_model(str(folder), dtype)
    with reading_weights(folder):
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if isinstance(buffer, LazyTensor):
                    module._buffers[name] = buffer.read(...)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    meta = {id(p): torch.empty(p.shape, dtype=p.dtype, device="meta") for p in model.parameters()}
    _replace_parameters(model, {key: nn.Parameter(tensor) for key, tensor in meta.items()})
    return model, weights, taken


def _replace_parameters(model: nn.Module, replacements: Mapping[int, nn.Parameter]) -> None:
    """Replace parameters, given by their ids, wherever they are used: tied weights stay tied."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = replacements[id(parameter)]


def _read_shards(model: nn.Module, weights: dict[str, Tensor], device: torch.device, folder: Path) -> None:
    """Replace the parameters, which are on the meta device, by this rank's rows of the weights."""
    loaded = {}
    with reading_weights(folder):
        for name, parameter in model.named_parameters():
            loaded[id(parameter)] = _read_shard(parameter, weights.pop(name), device)
    _replace_parameters(model, loaded)
    model._apply(lambda tensor: tensor)  # has each unit pad its shards to one size now, not in its first pass


def _read_shard(parameter: nn.Parameter, weight: Tensor, device: torch.device) -> nn.Parameter:
    start, meta = first_row(parameter), local_shard(parameter.detach())
    shard = torch.empty(meta.shape, dtype=meta.dtype, device=device)
    shard.copy_(rows_of(weight, slice(start, start + len(meta))))
    return nn.Parameter(from_local(shard, parameter))


class _StoredTensor(LazyTensor):
    """A tensor in a file; the library indexes those that the model takes."""

    use: Callable[[], None]

    def __getitem__(self, place: Any) -> Tensor:
        self.use()
        taken: Tensor = super().__getitem__(place)
        return taken


class _LazyFile:
    """A safetensors file, as `safe_open` opens it, that gives lazy tensors; ``taken`` gets the names of those used."""

    def __init__(self, taken: set[str], *args: Any, **options: Any) -> None:
        self._taken, self._file = taken, safe_open(*args, **options)

    def __enter__(self) -> "_LazyFile":
        return self

    def __exit__(self, *_: object) -> None:
        """Keep the file open: its tensors are read later."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_slice(self, name: str) -> LazyTensor:
        """A tensor that stays in the file until it is read."""
        stored = self._file.get_slice(name)
        shape = stored.get_shape()
        dtype = stored[0:0].dtype if shape else stored[...].dtype
        lazy = _StoredTensor(torch.empty(shape, dtype=dtype, device="meta"), lambda rows: stored[rows])
        lazy.use = partial(self._taken.add, name)
        lazy.get_shape, lazy.get_dtype = stored.get_shape, stored.get_dtype
        return lazy
