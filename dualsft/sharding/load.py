"""Loading a model so that each rank reads and holds its own rows of the weights alone.

The model is loaded as ever, but from files whose tensors are only described. What the loader does to them (it
renames, casts, stacks the experts of a layer into one tensor) is noted down, and done in the end to the rows that
this rank keeps.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, modeling_utils

from dualsft.errors import UserError
from dualsft.models.loading import Dtype, load_model, model_folder, reading_weights
from dualsft.sharding.lazy_tensor import LazyTensor, rows_of
from dualsft.sharding.shard_model import shard_model
from dualsft.sharding.shards import first_row, local_shard

_T = TypeVar("_T")


def load_sharded(
    name_or_path: str, mesh: DeviceMesh, dtype: Dtype = "auto", cpu_offload: bool = False
) -> PreTrainedModel:
    """The model of `load_model` in the shards of `shard_model`, without any rank ever holding all of it.

    Args:
        name_or_path: A Hugging Face model folder or hub id.
        mesh: All ranks along one axis; each of them calls this.
        dtype: Type to store the weights in; ``auto`` keeps the checkpoint's.
        cpu_offload: Keep shards and their gradients on the host.

    Raises:
        UserError: on every rank alike, as `load_model` and `shard_model` do.
    """
    folder = _on_all(mesh, lambda: model_folder(name_or_path))
    model, weights = _on_all(mesh, lambda: _lazy_model(folder, dtype))
    shard_model(model, mesh, cpu_offload)
    device = torch.device("cpu" if cpu_offload else mesh.device_type)
    _on_all(mesh, lambda: _fill(model, weights, device, folder))
    return model


def _on_all(mesh: DeviceMesh, action: Callable[[], _T]) -> _T:
    """What an action gives here, or the error of the first rank that it fails on."""
    result: Any = None
    message = ""
    try:
        result = action()
    except UserError as error:
        message = str(error)
    messages = [""] * mesh.size()
    distributed.all_gather_object(messages, message, group=mesh.get_group())
    if failures := [told for told in messages if told]:
        raise UserError(failures[0])
    return result


def _lazy_model(folder: Path, dtype: Dtype) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model whose parameters are on the meta device, and what would fill them."""
    with _lazy_files():
        model = load_model(str(folder), dtype)
    with reading_weights(folder):
        _read_buffers(model)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    empty = {id(p): torch.empty(p.shape, dtype=p.dtype, device="meta") for p in model.parameters()}
    _replace(model, {key: nn.Parameter(tensor) for key, tensor in empty.items()})
    return model, weights


@contextmanager
def _lazy_files() -> Iterator[None]:
    """Whatever `transformers` loads comes from files whose tensors are only described."""
    module: Any = modeling_utils
    module.safe_open, opened = _LazyFile, module.safe_open
    try:
        yield
    finally:
        module.safe_open = opened


def _read_buffers(model: nn.Module) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if isinstance(buffer, LazyTensor):
                module._buffers[name] = buffer.read(...)


def _replace(model: nn.Module, replacements: Mapping[int, nn.Parameter]) -> None:
    """Puts other parameters in the place of those of these ids, wherever they are used."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = replacements[id(parameter)]


def _fill(model: nn.Module, weights: dict[str, Tensor], device: torch.device, folder: Path) -> None:
    filled = {}
    with reading_weights(folder):
        for name, parameter in model.named_parameters():
            filled[id(parameter)] = _filled(parameter, weights.pop(name), device)
    _replace(model, filled)
    model._apply(lambda tensor: tensor)  # has each unit pad its shards to one size now, not in its first pass


def _filled(parameter: nn.Parameter, source: Tensor, device: torch.device) -> nn.Parameter:
    start, here = first_row(parameter), local_shard(parameter.detach())
    rows = slice(start, start + len(here))
    shard = torch.empty(here.shape, dtype=here.dtype, device=device)
    shard.copy_(rows_of(source, rows))
    whole: Any = parameter
    layout = {"device_mesh": whole.device_mesh, "placements": whole.placements, "run_check": False}
    return nn.Parameter(DTensor.from_local(shard, **layout, shape=whole.shape, stride=whole.stride()))


class _LazyFile:
    """A safetensors file, as `safe_open` gives it, whose tensors are only described."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._file = safe_open(*args, **options)

    def __enter__(self) -> "_DescribedFile":
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves it open for what is read from it later."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_slice(self, name: str) -> "Described":
        """A tensor that is still in the file."""
        stored = self._file.get_slice(name)
        shape = stored.get_shape()
        dtype = stored[0:0].dtype if shape else stored[...].dtype
        described = LazyTensor(torch.empty(shape, dtype=dtype, device="meta"), lambda rows: stored[rows])
        described.get_shape, described.get_dtype = stored.get_shape, stored.get_dtype
        return described
