"""Whole tensors in safetensors files that all ranks write at once, in the layout of Hugging Face's sharded checkpoints.

Each tensor lies whole in one file, so that one process, or any other number of ranks, can read them.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dualsft.sharding.collectives import barrier, rank, world_size
from dualsft.sharding.shards import full_tensor

_LARGEST_FILE = 5 * 10**9
"""Bytes, as `huggingface_hub` has it."""


def write_full_tensors(shards: Mapping[str, Tensor], like: Mapping[str, Tensor], folder: Path, stem: str) -> None:
    """Write tensors of which each rank has its shard; all ranks take part, and each writes about as much.

    Args:
        shards: Name -> this rank's shard, of any type.
        like: Name -> the parameter that is sharded in the same way.
        folder: A folder that the ranks share.
        stem: The files are ``STEM-0000N-of-0000M.safetensors``, with an index if there are several.
    """
    shapes = {n: torch.empty(like[n].shape, dtype=t.dtype, device="meta") for n, t in sorted(shards.items())}
    size = sum(t.nbytes for t in shapes.values())
    each = min(_LARGEST_FILE, -(-size // world_size()))
    plan = split_torch_state_dict_into_shards(
        shapes, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=max(each, 1)
    )
    own: dict[str, dict[str, Tensor]] = {}
    for k, (file, names) in enumerate(plan.filename_to_tensors.items()):
        for name in names:
            tensor = full_tensor(shards[name], like[name])
            if k % world_size() == rank():
                own.setdefault(file, {})[name] = tensor.cpu().contiguous()
            del tensor
    for file, held in own.items():  # all ranks at once
        save_file(held, folder / file, {"format": "pt"})
    if plan.is_sharded and rank() == 0:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    barrier()


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of such files, each read when it is asked for.

    Args:
        folder: Where they lie.
        stem: How their names begin.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self._files = {}
        for path in sorted(folder.glob(f"{stem}*.safetensors")):
            stored = safe_open(path, framework="pt")
            self._files.update(dict.fromkeys(stored.keys(), stored))

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def __len__(self) -> int:
        return len(self._files)
