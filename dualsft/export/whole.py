"""A base that is more than its causal language model, written as a whole with the model's new weights in their places.

The library takes the text part of some multimodal checkpoints, and leaves out layers that only serve to draft tokens.
What it leaves out stays as it is in the base's files, as do the names, the division into files and the configuration.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dualsft.errors import UserError
from dualsft.models import PreTrainedModel
from dualsft.models.loading import model_folder
from dualsft.models.stored import Weights, has_own_names, stored_weights
from dualsft.sharding.collectives import on_rank_zero
from dualsft.sharding.files import METADATA, write_files
from dualsft.sharding.lazy_tensor import LazyTensor
from dualsft.sharding.load import lazy_model
from dualsft.sharding.save import lazy_state, plan_files, untied_state
from dualsft.sharding.shard_model import is_sharded

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
_COMPUTED = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|attn(\.attention)?\.bias)$")
"""Buffers that old checkpoints store, and models compute."""


@dataclass(frozen=True)
class Whole:
    """What a base has beside its causal language model.

    Attributes:
        base: The tensors of its files.
        names: Name that the library saves a weight of the model under -> its name in the base's files.
        rest: Names in the files of what is no part of the model.
    """

    base: Weights
    names: Mapping[str, str]
    rest: frozenset[str]

    def write(self, model: PreTrainedModel, folder: Path) -> None:
        """Write a trained model of the base as a Hugging Face folder; every rank calls this for a sharded one."""
        files = plan_files(model, folder, lazy_state(model) if is_sharded(model) else None)
        new = {self.names[name]: tensor for _, tensors, _ in files for name, tensor in tensors.items()}
        tensors = new | {name: _lazy(self.base, name) for name in sorted(self.rest)}
        weight_map = {name: file for name, file in self._weight_map() if name in tensors}
        on_rank_zero(lambda: self._prepare(folder, model.dtype, weight_map))
        held = {file: {n: tensors[n] for n, of in weight_map.items() if of == file} for file in weight_map.values()}
        write_files(folder, ((file, held[file], METADATA) for file in sorted(held)))

    def _weight_map(self) -> Iterator[tuple[str, str]]:
        assert self.base.files is not None
        return ((name, path.relative_to(self.base.folder).as_posix()) for name, path in self.base.files.items())

    def _prepare(self, folder: Path, dtype: torch.dtype, weight_map: Mapping[str, str]) -> None:
        """Write all but the weights: the base's configuration, and the index if it has one."""
        for file in set(weight_map.values()):  # an index may name folders
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
        _write_config(self.base.folder / CONFIG, folder / CONFIG, str(dtype).removeprefix("torch."))
        if (self.base.folder / INDEX).is_file():
            index = json.loads((self.base.folder / INDEX).read_text(encoding="utf-8"))
            text = json.dumps({**index, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
            (folder / INDEX).write_text(text, encoding="utf-8")


def whole_of(base: str) -> Whole | None:
    """What is to be kept of a base, a folder or hub id; None if the base is its causal language model and no more.

    Raises:
        UserError: if the base cannot be loaded, or stores the model in another form than the library saves it in.
    """
    stored = stored_weights(model_folder(base))
    if has_own_names(stored):
        return None
    model, _, taken = lazy_model(stored.folder)
    rest = frozenset(name for name in stored.specs.keys() - taken if not _COMPUTED.search(name))
    kind = json.loads((stored.folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
    if not rest and kind == model.config.model_type:
        return None
    with TemporaryDirectory() as unused:
        files = plan_files(model, Path(unused), untied_state(model))
    saved = {name: tuple(tensor.shape) for _, tensors, _ in files for name, tensor in tensors.items()}
    names = _places(saved, taken)
    if any(name not in names or stored.specs[names[name]].shape != shape for name, shape in saved.items()):
        raise UserError(
            f"{base} is more than a causal language model ({min(rest, default=kind)}), and stores the model in another "
            "form than transformers saves it in, so that it cannot be written as a whole; give a checkpoint of the "
            "language model alone."
        )
    return Whole(stored, names, rest)


def _places(saved: Iterable[str], taken: set[str]) -> dict[str, str]:
    """Name that a weight is saved under -> its name in the files, which may have further parts at its start."""
    found = {}
    for name in saved:
        ends = [name] if name in taken else [one for one in taken if one.endswith(f".{name}")]
        if len(ends) == 1:
            found[name] = ends[0]
    return found if len(set(found.values())) == len(found) else {}


def _lazy(base: Weights, name: str) -> LazyTensor:
    spec = base.specs[name]
    return LazyTensor(torch.empty(spec.shape, dtype=spec.dtype, device="meta"), lambda rows: base.read(name)[rows])


def _write_config(source: Path, target: Path, dtype: str) -> None:
    """Copy a configuration; another type of the weights is entered where it names one."""
    config = json.loads(source.read_text(encoding="utf-8"))
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    named = [(part, key) for part in parts for key in ("dtype", "torch_dtype") if key in part]
    if all(part[key] == dtype for part, key in named):
        shutil.copyfile(source, target)
        return
    for part, key in named:
        part[key] = dtype
    target.write_text(json.dumps(config, indent=2), encoding="utf-8")
