"""Writing what is in shards: a model's files, as `save_pretrained` writes them of one in one piece, and others.

The library decides what goes into which file and under which name, with tensors that are not there
(`dualsft.sharding.lazy_tensor`). For each file the ranks make the weights whole that it is made of.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import PreTrainedModel, modeling_utils

from dualsft.errors import UserError
from dualsft.models.tensor_file import TensorSpec, write_tensors
from dualsft.sharding.collectives import all_gather, on_rank_zero, rank, world_size
from dualsft.sharding.lazy_tensor import LazyTensor, Rows, rows_of
from dualsft.sharding.shards import full_tensor, local_shard

_LARGEST_FILE, _WORTH_DIVIDING = 50 * 10**9, 10**9
"""Bytes: the largest file, as `save_pretrained` has it, and a model of how many is divided between ranks."""

_KEPT = 2  # two stacks of a layer's experts, whose parts lie side by side in a file


def save_sharded(model: PreTrainedModel, folder: Path) -> None:
    """Write a sharded model as a Hugging Face folder; every rank calls this, and each writes about as much.

    Args:
        model: No rank holds more of the whole at a time than the files that it writes.
        folder: Where to.
    """
    like = dict(model.named_parameters())

    @lru_cache(maxsize=_KEPT)
    def make_whole(name: str) -> Tensor:
        return full_tensor(local_shard(like[name].detach()), like[name]).cpu()

    files = _Files(folder)
    with TemporaryDirectory() as elsewhere, files.taking(), _saving_on_every_rank(model):
        # all ranks plan the same files, and make weights whole together; what goes with them the first one writes
        target = folder if rank() == 0 else elsewhere
        size = sum(p.numel() * p.element_size() for p in like.values())
        each = min(_LARGEST_FILE, max(_WORTH_DIVIDING, -(-size // world_size())))
        model.save_pretrained(target, state_dict=_described(model, make_whole), max_shard_size=each)
    files.write()


@contextmanager
def _saving_on_every_rank(model: Any) -> Iterator[None]:
    """Newer releases of `transformers` save on the first rank alone, unless asked not to."""
    model.should_save_on_this_rank = lambda is_main_process: True
    try:
        yield
    finally:
        del model.should_save_on_this_rank


class _Files:
    """The files of a model as the library plans them, of which each rank takes its own.

    Args:
        folder: Where they belong.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own: dict[str, tuple[dict[str, Tensor], Mapping[str, str]]] = {}
        self._count = 0

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Whatever `transformers` saves comes here."""
        module: Any = modeling_utils
        module.safe_save_file, usual = self._take, module.safe_save_file
        try:
            yield
        finally:
            module.safe_save_file = usual

    def _take(self, tensors: Mapping[str, Tensor], path: str, metadata: Mapping[str, str] | None = None) -> None:
        mine = self._count % world_size() == rank()
        self._count += 1
        kept = {}
        for name in sorted(tensors):
            tensor = rows_of(tensors[name], ...)
            if mine:
                kept[name] = tensor
        if mine:
            self._own[Path(path).name] = kept, metadata or {}

    def write(self) -> None:
        """Write this rank's files, while the others write theirs.

        Raises:
            UserError: on every rank, if one cannot.
        """
        message = ""
        try:
            for name, (tensors, metadata) in self._own.items():
                specs = {n: TensorSpec(tensor.dtype, tuple(tensor.shape)) for n, tensor in tensors.items()}
                write_tensors(self._folder / name, specs, tensors.__getitem__, metadata)
        except OSError as error:
            message = f"{self._folder} cannot be written ({error.strerror}); see that it has room."
        if failed := [told for told in all_gather(message) if told]:
            raise UserError(failed[0])


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
        return full_tensor(shards[name], like[name]).cpu()

    def act() -> None:
        try:
            action(ask)
        finally:
            _tell(None)

    if rank():
        while (name := _tell(None)) is not None:
            full_tensor(shards[name], like[name])
    on_rank_zero(act)


def _tell(name: str | None) -> str | None:
    """What the first rank tells."""
    told = [name]
    if world_size() > 1:
        distributed.broadcast_object_list(told)
    return told[0]


def _described(model: PreTrainedModel, ask: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The model's state, tied weights once, with weights that are asked for when they are read."""
    parameters = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - parameters.keys()
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    for name in state.keys() & parameters.keys():
        like = torch.empty(parameters[name].shape, dtype=parameters[name].dtype, device="meta")
        state[name] = LazyTensor(like, partial(_read, ask, name), "meta")
    return state


def _read(ask: Callable[[str], Tensor], name: str, rows: Rows) -> Tensor:
    return ask(name)[rows]
