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
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel, modeling_utils

from dualsft.distributed.described import Described, Rows, rows_of
from dualsft.distributed.ranks import first, rank, ranks
from dualsft.distributed.sharding import local
from dualsft.distributed.shards import whole
from dualsft.finetune.tensor_file import TensorSpec, write_tensors

_KEPT = 2  # two stacks of a layer's experts, whose parts lie side by side in a file


def save_sharded(model: PreTrainedModel, folder: Path) -> None:
    """Write a sharded model as a Hugging Face folder; the first rank does, and every rank calls this.

    Args:
        model: No rank holds more than its shards and a weight or two.
        folder: Where to.
    """
    shards = dict(model.named_parameters())

    @lru_cache(maxsize=_KEPT)
    def ask(name: str) -> Tensor:
        _tell(name)
        return whole(local(shards[name].detach()), shards[name]).cpu()

    def write() -> None:
        try:
            with _written_one_by_one():
                model.save_pretrained(folder, state_dict=_described(model, ask))
        finally:
            _tell(None)

    if rank():
        _answer(shards)
    first(write)


def _answer(shards: Mapping[str, nn.Parameter]) -> None:
    """Help to make those weights whole that the first rank asks for, until it is done."""
    while (name := _tell(None)) is not None:
        whole(local(shards[name].detach()), shards[name])


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
