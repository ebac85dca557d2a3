"""A delta: the change that a fine-tune made, as indices and new values.

    <name>.index    int64, flat, ascending: which entries of the parameter have other bits than in the base model
    <name>.value    their new values, in the tuned model's type
    metadata        base_fingerprint: the hash of the base weights; about: JSON, the record of how it was made; crc32

Where the tuned model is stored in another type than its base, the base is first converted to that type. An entry that
was trained but kept its bits is left out: of an embedding, or in bfloat16, these may be many.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Int, Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dualsft.errors import UserError
from dualsft.export.model_card import legible
from dualsft.models.entries import set_entries
from dualsft.models.tensor_file import DTYPES, TensorSpec, check_tensors, write_tensors
from dualsft.sharding.shards import local_shard, shard_offset
from dualsft.sharding.vectors import gather_vectors

Change: TypeAlias = tuple[Int[Tensor, " changed"], Shaped[Tensor, " changed"]]
"""Flat indices, ascending, and the new values there."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_INDEX, _VALUE, _BASE, _ABOUT = ".index", ".value", "base_fingerprint", "about"
_SECTIONS = ("base", "counts", "selection", "training", "versions")
_RECORDED_TYPES = [None, "auto", *(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())]


def changed_entries(before: Shaped[Tensor, "..."], after: Shaped[Tensor, "..."]) -> Change:
    """Where two tensors of one type and shape differ in their bits: 0 and -0 do, a NaN and itself do not."""
    bits = _BITS[after.element_size()]
    was, now = (tensor.contiguous().flatten() for tensor in (before, after))
    index = (was.view(bits) != now.view(bits)).nonzero().squeeze(1)
    return index, now[index]


def changes(
    before: Callable[[str], Tensor], after: Callable[[str], Tensor], names: Iterable[str]
) -> Iterator[tuple[str, Change]]:
    """Yields (name, change) of each tensor that has changed; memory holds two tensors at a time."""
    for name in names:
        tuned = after(name).cpu()
        change = changed_entries(before(name).to(tuned), tuned)
        if len(change[0]):
            yield name, change
        del tuned, change


@dataclass(frozen=True)
class Changes:
    """What a fine-tune changed, one parameter at a time: the indices of all weights take twice their memory or more.

    Attributes:
        counts: Name of each changed parameter -> how many of its entries changed.
        value_types: Name of each changed parameter -> the type of its values.
        change: Returns the indices and new values of one parameter.
    """

    counts: Mapping[str, int]
    value_types: Mapping[str, torch.dtype]
    change: Callable[[str], Change]


def find_changes(before: Callable[[str], Tensor], after: Callable[[str], Tensor], names: Iterable[str]) -> Changes:
    """The changed tensors; each is compared now and, as neither indices nor values are held, again at every use."""
    counts, types = {}, {}
    for name, (index, value) in changes(before, after, names):
        counts[name], types[name] = len(index), value.dtype
        del index, value  # before the next tensor is read

    def change(name: str) -> Change:
        ((_, found),) = changes(before, after, [name])
        return found

    return Changes(counts, types, change)


def sharded_changes(before: Callable[[str], Tensor], after: Mapping[str, Tensor], names: Iterable[str]) -> Changes:
    """The changes of a sharded model, held on rank zero alone; every rank must call this.

    ``before`` gives this rank's rows of a tensor, ``after`` holds the model's sharded parameters.
    """
    indices, values = {}, []
    for name in names:
        shard = local_shard(after[name].detach()).cpu()
        index, value = changed_entries(before(name).to(shard), shard)
        indices[name] = index + shard_offset(after[name])
        values.append(value)
    gathered = zip(indices, gather_vectors(list(indices.values())), gather_vectors(values), strict=True)
    found = {name: (index, value) for name, index, value in gathered if len(index)}
    counts, types = {n: len(index) for n, (index, _) in found.items()}, {n: v.dtype for n, (_, v) in found.items()}
    return Changes(counts, types, found.__getitem__)


def write_delta(path: Path, changed: Changes, base_fingerprint: str, about: Mapping[str, Any] | None = None) -> None:
    """Write a delta, the same bytes on every run; ``about`` is its record for JSON (`dualsft.export.provenance`)."""
    specs = {}
    for name, count in changed.counts.items():
        specs[name + _INDEX] = TensorSpec(torch.int64, (count,))
        specs[name + _VALUE] = TensorSpec(changed.value_types[name], (count,))

    def read(key: str) -> Tensor:
        is_index = key.endswith(_INDEX)
        index, value = changed.change(key.removesuffix(_INDEX if is_index else _VALUE))
        return index if is_index else value

    metadata = {_BASE: base_fingerprint, _ABOUT: json.dumps(about or {})}
    write_tensors(path, specs, read, metadata, checksum=True)


@dataclass(frozen=True)
class Delta:
    """A delta on disk; `change` reads the indices and values of one parameter.

    Attributes:
        path: Its file.
        base_fingerprint: The hash of the weights that it belongs to.
        about: The record of how it was made; empty if there is none.
        counts: Name of each changed parameter, sorted -> how many of its entries change.
        value_types: Name of each changed parameter -> the type of its new values.
    """

    path: Path
    base_fingerprint: str
    about: dict[str, Any]
    counts: dict[str, int]
    value_types: dict[str, torch.dtype]

    def change(self, name: str) -> Change:
        """Indices and new values of one parameter; refuses those that do not belong together."""
        with safe_open(self.path, framework="pt") as stored:
            index, value = stored.get_tensor(name + _INDEX), stored.get_tensor(name + _VALUE)
        if index.dtype != torch.int64 or index.ndim != 1 or value.shape != index.shape:
            raise UserError(f"{self.path} is damaged: {name} has indices and values that do not belong together.")
        if bool((index[1:] <= index[:-1]).any()):
            raise UserError(f"{self.path} is damaged: the indices of {name} are not in ascending order.")
        return index, value

    def check_base(self, fingerprint: str, named: str) -> None:
        """Refuse other base weights."""
        if self.base_fingerprint != fingerprint:
            raise UserError(
                f"{self.path} belongs to base weights {self.base_fingerprint[:12]}, {named} has {fingerprint[:12]}; "
                "give the model that it was made from."
            )

    def check_entries(self, specs: Mapping[str, TensorSpec], named: str) -> None:
        """Refuse entries outside of a model's parameters; one parameter is read at a time."""
        for name in self.counts:
            if name not in specs:
                raise UserError(
                    f"{self.path} changes {name}, which {named} does not have; they do not belong together."
                )
            index, _ = self.change(name)
            size = prod(specs[name].shape)
            if len(index) and not 0 <= int(index[0]) <= int(index[-1]) < size:
                raise UserError(f"{self.path} is damaged: {name} has {size:,} entries, and it changes others.")


def open_delta(path: Path) -> Delta:
    """Open a delta; refuses a file that is damaged or no delta."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a delta.safetensors.")
    try:
        with safe_open(path, framework="pt") as stored:
            metadata, parts = stored.metadata() or {}, {key: stored.get_slice(key) for key in stored.keys()}  # noqa: SIM118
            shapes = {key: part.get_shape() for key, part in parts.items()}
            dtypes = {key: DTYPES[part.get_dtype()] for key, part in parts.items()}
        check_tensors(path)
        about = json.loads(metadata.get(_ABOUT, "{}"))
        json.dumps(about, ensure_ascii=False).encode()  # a lone surrogate, as an escape, could not be written again
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
        raise UserError(f"{path} is damaged, or no delta ({error}); give a delta.safetensors.") from error
    if _BASE not in metadata:
        raise UserError(f"{path} is not a delta: its metadata name no base weights; give a delta.safetensors.")
    names = sorted(key.removesuffix(_INDEX) for key in shapes if key.endswith(_INDEX))
    if odd := sorted(shapes.keys() ^ {name + part for name in names for part in (_INDEX, _VALUE)}):
        raise UserError(f"{path} is damaged: of {odd[0]} only one of index and value is there.")
    if any(len(shape) != 1 for shape in shapes.values()):
        raise UserError(f"{path} is damaged: its indices and values are not all vectors.")
    if odd := [name for name in names if not dtypes[name + _VALUE].is_floating_point]:
        raise UserError(
            f"{path} is damaged: it holds {odd[0]} as {dtype_name(dtypes[odd[0] + _VALUE])}, which weights are not."
        )
    counts = {name: shapes[name + _INDEX][0] for name in names}
    record = _sound_record(about) if isinstance(about, dict) else {}
    return Delta(path, metadata[_BASE], record, counts, {name: dtypes[name + _VALUE] for name in names})


def _sound_record(about: dict[str, Any]) -> dict[str, Any]:
    """A record without what is of a wrong type, as metadata can be edited with other tools."""
    sound = {key: part for key, part in about.items() if key not in _SECTIONS or isinstance(part, dict)}
    if sound.get("base", {}).get("dtype") not in _RECORDED_TYPES:
        sound["base"] = {key: value for key, value in sound.get("base", {}).items() if key != "dtype"}
    if "counts" in sound:
        sound["counts"] = {key: value for key, value in sound["counts"].items() if type(value) is int}
    return legible(sound)


def patched(tensor: Tensor, change: Change) -> Tensor:
    """A copy of a tensor with new values at some entries; a ValueError if they would be rounded to another type."""
    index, value = change
    if value.dtype != tensor.dtype:
        raise ValueError(f"values of {value.dtype} for a tensor of {tensor.dtype}")
    new = tensor.clone()
    set_entries(new, index.to(tensor.device), value.to(tensor.device))
    return new


@torch.no_grad()
def apply_delta(path: Path, model: nn.Module, base_fingerprint: str) -> None:
    """Set the changed weights of the base model to their new values.

    Raises:
        UserError: if the delta is damaged, belongs to other base weights, or the model is loaded in another type than
            the values.
    """
    delta = open_delta(path)
    delta.check_base(base_fingerprint, "the model")
    weights = dict(model.named_parameters())
    delta.check_entries({name: TensorSpec.of(weight) for name, weight in weights.items()}, "the model")
    for name in delta.counts:
        (index, value), weight = delta.change(name), weights[name]
        if value.dtype != weight.dtype:
            stored = dtype_name(value.dtype)
            raise UserError(
                f"{path} holds {name} as {stored}, the model as {dtype_name(weight.dtype)}; load the base model in "
                f"{stored}."
            )
        set_entries(weight, index.to(weight.device), value.to(weight.device))


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a type as the options spell it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
