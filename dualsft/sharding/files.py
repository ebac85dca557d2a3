"""Safetensors files of full tensors, which all ranks write together and any number of ranks can read.

Each file is written by one rank; if one rank cannot write, every rank raises `UserError`. The ranks gather the tensors
of all files one by one, and each keeps those of its own files. Then they write at the same time.

``shards`` are this rank's shards by name, of any type, and ``like`` the parameters that are sharded in the same way.
"""

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor

from dualsft.models.lazy import LazyTensors
from dualsft.models.tensor_file import TensorSpec, write_tensors
from dualsft.sharding.collectives import on_all_ranks, on_rank_zero
from dualsft.sharding.groups import calls_alone, rank, world_size
from dualsft.sharding.lazy_tensor import LazyTensor, Rows, rows_of
from dualsft.sharding.shards import full_tensor
from dualsft.storage.writing import write_atomically, writing_to

METADATA = {"format": "pt"}

_MAX_FILE = 5 * 10**9
"""Bytes, the default of `huggingface_hub`."""


def lazy_full_tensors(
    shards: Mapping[str, Tensor], like: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Full tensors that are all-gathered to the host when read; every rank must read them, in the same order.

    With the ``dtype`` of all shards, none is read before.
    """

    @lru_cache(maxsize=2)  # a model's file alternates slices of a layer's two stacks of experts
    def gather(name: str) -> Tensor:
        return full_tensor(shards[name], like[name]).cpu()

    def read(name: str, rows: Rows) -> Tensor:
        return gather(name)[rows]

    meta = {n: torch.empty(like[n].shape, dtype=dtype or shards[n].dtype, device="meta") for n in shards}
    return {n: LazyTensor(meta[n], partial(read, n), "meta") for n in shards}


def write_files(folder: Path, files: Iterable[tuple[str, Mapping[str, Tensor], Mapping[str, str]]]) -> None:
    """Write files of lazy tensors; every rank calls this, and rank r writes every file k with k ≡ r mod world size.

    A single process, or a replica, holds one tensor at a time.

    Args:
        folder: The folder, which the ranks share.
        files: Name, tensors and metadata of each file; the same on every rank.
    """
    own: dict[str, tuple[Mapping[str, Tensor], Mapping[str, str]]] = {}
    for k, (file, lazy, metadata) in enumerate(files):
        keep = k % world_size() == rank()
        tensors = (lazy if keep else {}) if calls_alone() else _gathered(lazy, keep)
        if tensors:
            own[file] = tensors, metadata

    def write() -> None:
        with writing_to(folder):
            for file, (tensors, metadata) in own.items():
                specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
                write_tensors(folder / file, specs, partial(_read, tensors), metadata)

    on_all_ranks(write)


def _gathered(lazy: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors of a file, of which this rank keeps all or none."""
    read = {}
    for name in sorted(lazy):
        tensor = _read(lazy, name)
        if keep:
            read[name] = tensor
    return read


def _read(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return rows_of(tensors[name], ...)


def write_full_tensors(
    shards: Mapping[str, Tensor],
    like: Mapping[str, Tensor],
    folder: Path,
    stem: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Write sharded tensors in the layout of Hugging Face's sharded checkpoints; each rank writes about as much.

    With the ``dtype`` of all shards each is read when it is written.

    The files are ``STEM-0000N-of-0000M.safetensors``, with an index if there are several.
    """
    lazy = dict(sorted(lazy_full_tensors(shards, like, dtype).items()))
    per_rank = -(-sum(tensor.nbytes for tensor in lazy.values()) // world_size())
    plan = split_torch_state_dict_into_shards(
        lazy, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=max(1, min(_MAX_FILE, per_rank))
    )
    contents = plan.filename_to_tensors
    write_files(folder, ((file, {name: lazy[name] for name in contents[file]}, METADATA) for file in contents))
    if plan.is_sharded:
        index = json.dumps({"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}, indent=2)
        on_rank_zero(lambda: write_atomically(folder / f"{stem}.safetensors.index.json", index))


def full_tensor_files(folder: Path, stem: str) -> list[Path]:
    """The files that `write_full_tensors` wrote."""
    return sorted(folder.glob(f"{stem}*.safetensors"))


def read_full_tensors(paths: Iterable[Path]) -> Mapping[str, Tensor]:
    """The tensors in these files, by name; each is read from its file when it is asked for."""
    files = {}
    for path in paths:
        stored = safe_open(path, framework="pt")
        files.update(dict.fromkeys(stored.keys(), stored))
    return LazyTensors(sorted(files), lambda name: files[name].get_tensor(name))
