"""Writing a sharded model's files, to the byte as `save_pretrained` writes them of the same model in one piece.

The library decides what goes into which file and under which name, on the first rank, with tensors that are not there
(`dualsft.distributed.described`). When one is written, the ranks make the weights whole that it is made of.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import PreTrainedModel, modeling_utils

from dualsft.distributed.described import Described, Rows, rows_of
from dualsft.distributed.ranks import first, rank, ranks
from dualsft.distributed.sharding import local
from dualsft.distributed.shards import whole
from dualsft.tensor_file import TensorSpec, write_tensors

_KEPT = 2  # two stacks of a layer's experts, whose parts lie side by side in a file


def save_sharded(model: PreTrainedModel, folder: Path) -> None:
    """Write a sharded model as a Hugging Face folder; the first rank does, and every rank calls this.

    Args:
        model: No rank holds more than its shards and a weight or two.
        folder: Where to.
    """
    like = dict(model.named_parameters())

    def write(ask: Callable[[str], Tensor]) -> None:
        with _written_one_by_one():
            model.save_pretrained(folder, state_dict=_described(model, ask))

    _with_wholes({name: local(p.detach()) for name, p in like.items()}, like, write)


def write_shards(shards: Mapping[str, Tensor], like: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors of which each rank has its shard into one safetensors file; every rank calls this.

    Args:
        shards: Name -> this rank's shard.
        like: Name -> the parameter that is sharded in the same way.
        path: Where to.
    """
    specs = {name: TensorSpec(shard.dtype, tuple(like[name].shape)) for name, shard in shards.items()}
    _with_wholes(shards, like, lambda ask: write_tensors(path, specs, ask, {"format": "pt"}))


def _with_wholes(
    shards: Mapping[str, Tensor], like: Mapping[str, Tensor], action: Callable[[Callable[[str], Tensor]], None]
) -> None:
    """Do something on the first rank, which may ask for tensors by name; the others help to make them whole."""

    @lru_cache(maxsize=_KEPT)
    def ask(name: str) -> Tensor:
        _tell(name)
        return whole(shards[name], like[name]).cpu()

    def act() -> None:
        try:
            action(ask)
        finally:
            _tell(None)

    if rank():
        while (name := _tell(None)) is not None:
            whole(shards[name], like[name])
    first(act)


def _tell(name: str | None) -> str | None:
    """What the first rank tells."""
    told = [name]
    if ranks() > 1:
        distributed.broadcast_object_list(told)
    return told[0]


def _described(model: PreTrainedModel, ask: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The model's state, tied weights once, with weights that are asked for when they are read."""
    parameters = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - parameters.keys()
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    for name in state.keys() & parameters.keys():
        like = torch.empty(parameters[name].shape, dtype=parameters[name].dtype, device="meta")
        state[name] = Described(like, partial(_read, ask, name), "meta")
    return state


def _read(ask: Callable[[str], Tensor], name: str, rows: Rows) -> Tensor:
    return ask(name)[rows]


@contextmanager
def _written_one_by_one() -> Iterator[None]:
    """Whatever `transformers` saves is read and written one tensor at a time."""
    module: Any = modeling_utils
    module.safe_save_file, usual = _write, module.safe_save_file
    try:
        yield
    finally:
        module.safe_save_file = usual


def _write(tensors: Mapping[str, Tensor], path: str, metadata: Mapping[str, str] | None = None) -> None:
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(Path(path), specs, lambda name: rows_of(tensors[name], ...), metadata or {})
