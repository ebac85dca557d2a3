"""From base and delta to the tuned checkpoint, back again, and from two checkpoints to their delta.

Each function here looks at everything that can be wrong, and returns what then writes the result into an empty folder.
Where the files hold the parameters under the model's own names, both steps read one tensor at a time and write file by
file, in the base's own division into files; memory holds one parameter, and of `prepare_extract` the delta. Where they
do not (`dualsft.models.stored` tells when), or the delta's values are of another type than the base is stored in,
the model is loaded whole.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast, get_args

from torch import Tensor

from dualsft.data import load_tokenizer
from dualsft.errors import UserError
from dualsft.export.configurations import check_configurations
from dualsft.export.delta import Delta, apply_delta, changes, open_delta, patched, plain, write_delta
from dualsft.export.model_card import write_card
from dualsft.export.pretrained import copy_companions, save_model
from dualsft.export.record import describe_base, num_weights, versions
from dualsft.models.loading import Dtype, empty_model, load_model, model_fingerprint, model_folder, weights_fingerprint
from dualsft.models.stored import (
    Weights,
    has_own_names,
    loaded_weights,
    parameter_weights,
    stored_weights,
)
from dualsft.models.tensor_file import write_tensors

Writer = Callable[[Path], None]
"""Writes a result into an empty folder."""

CONFIG, _INDEX = "config.json", "model.safetensors.index.json"


def prepare_apply(base: str, delta: str) -> Writer:
    """The tuned model, as a Hugging Face folder.

    Args:
        base: The base model's folder or hub id.
        delta: A ``delta.safetensors`` that belongs to it.

    Raises:
        UserError: if either cannot be read, they do not belong together, or the base has no tokenizer.
    """
    change, stored = open_delta(Path(delta)), stored_weights(model_folder(base))
    load_tokenizer(base)
    about = check_pair(change, base)
    if has_own_names(stored) and _keeps_types(change, stored):
        change.check_entries(stored.specs, base)
        return _streamed_model(stored, _with_changes(stored, change), base, about)
    return _loaded_model(change, base, about)


def _keeps_types(change: Delta, stored: Weights) -> bool:
    """Whether the delta was made with every weight in the type that it is stored in."""
    specs = stored.specs
    alike = all(name not in specs or specs[name].dtype == dtype for name, dtype in change.value_types.items())
    return alike and (loaded_type(change) == "auto" or float_types(stored) == {loaded_type(change)})


def check_pair(change: Delta, base: str) -> dict[str, Any]:
    """What is known of a change, once it is known to belong to this base.

    Raises:
        UserError: if it belongs to other weights.
    """
    change.check_base(fingerprint := model_fingerprint(base), base)
    counts = {"changed": sum(change.counts.values()), "all": num_weights(empty_model(base))}
    return {
        **change.about,
        "base": {**describe_base(base, fingerprint, loaded_type(change)), **change.about.get("base", {})},
        "counts": {**change.about.get("counts", {}), **counts},
    }


def loaded_type(change: Delta) -> str:
    """The type that a delta wants its base loaded in: the one that it names, otherwise that of its values."""
    found = {plain(dtype) for dtype in change.dtypes}
    return str(change.about.get("base", {}).get("dtype") or (found.pop() if len(found) == 1 else "auto"))


def float_types(weights: Weights) -> set[str]:
    """The names of the floating types in use."""
    return {plain(spec.dtype) for spec in weights.specs.values() if spec.dtype.is_floating_point}


def _with_changes(stored: Weights, change: Delta) -> Callable[[str], Tensor]:
    names = set(change.names)
    return lambda name: patched(stored.read(name), change.change(name)) if name in names else stored.read(name)


def _streamed_model(layout: Weights, read: Callable[[str], Tensor], base: str, about: Mapping[str, Any]) -> Writer:
    def write(folder: Path) -> None:
        _write_files(layout, read, folder)
        copy_companions(base, folder)
        if about:
            write_card(folder, about)

    return write


def _write_files(layout: Weights, read: Callable[[str], Tensor], folder: Path) -> None:
    """Write tensors under the names, in the types and in the files of a checkpoint, with its configuration."""
    assert layout.files is not None
    for file in sorted(set(layout.files.values())):
        specs = {name: layout.specs[name] for name, held in layout.files.items() if held == file}
        target = folder / file.relative_to(layout.folder)  # an index may name folders
        target.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(target, specs, read, {"format": "pt"})
    shutil.copyfile(layout.folder / CONFIG, folder / CONFIG)
    if not (folder / "model.safetensors").is_file():
        shutil.copyfile(layout.folder / _INDEX, folder / _INDEX)


def _loaded_model(change: Delta, base: str, about: Mapping[str, Any]) -> Writer:
    dtype = loaded_type(change)
    model = load_model(base, cast(Dtype, dtype) if dtype in get_args(Dtype) else "auto")
    apply_delta(change.path, model, change.base_fingerprint)

    def write(folder: Path) -> None:
        save_model(model, base, folder)
        write_card(folder, about)

    return write


def prepare_revert(model: str, base: str, delta: str) -> Writer:
    """The base model again, from a tuned one: of the base only the changed entries' old values are taken.

    Args:
        model: The tuned model's folder or hub id.
        base: The base model's folder or hub id.
        delta: The ``delta.safetensors`` that led from one to the other.

    Raises:
        UserError: if one cannot be read, they do not belong together, or what comes out is not the base's weights: if
            the model differs from the base elsewhere too, or was rounded to a narrower type.
    """
    change = open_delta(Path(delta))
    change.check_base(model_fingerprint(base), base)
    load_tokenizer(base)
    old, tuned = stored_weights(model_folder(base)), stored_weights(model_folder(model))
    if not (has_own_names(old) and tuned.specs.keys() == old.specs.keys()):
        _check_reverted(change, model, base)
        return _streamed_model(old, old.read, base, {})
    _check_alike(old, tuned)
    change.check_entries(old.specs, base)
    read = _with_old_values(old, tuned, change)
    if weights_fingerprint((name, read(name)) for name in sorted(old.specs)) != change.base_fingerprint:
        raise _irreversible(model, base)
    return _streamed_model(old, read, base, {})


def _with_old_values(old: Weights, tuned: Weights, change: Delta) -> Callable[[str], Tensor]:
    names = set(change.names)

    def read(name: str) -> Tensor:
        tensor = tuned.read(name).to(old.specs[name].dtype)
        if name not in names:
            return tensor
        index, _ = change.change(name)
        return patched(tensor, (index, old.read(name).flatten()[index]))

    return read


def _check_reverted(change: Delta, model: str, base: str) -> None:
    """See on the loaded models that the tuned one without the change is the base; its files hold other names."""
    old, tuned = loaded_weights(base), loaded_weights(model)
    _check_alike(old, tuned)
    change.check_entries(old.specs, base)
    if changes(old.read, _with_old_values(old, tuned, change), old.specs):
        raise _irreversible(model, base)


def _irreversible(model: str, base: str) -> UserError:
    return UserError(
        f"{model} without the delta's change does not have the weights of {base}: it was made from another model, "
        "trained further, or rounded to a narrower type; give the model that the delta led to."
    )


def prepare_extract(base: str, model: str) -> Writer:
    """A ``delta.safetensors`` that leads from one checkpoint to another.

    Args:
        base: The base model's folder or hub id.
        model: The tuned model's folder or hub id.

    Raises:
        UserError: if one cannot be read, they do not make the same model of the same weights, nothing differs, or
            something differs that is not a parameter.
    """
    old, tuned = parameter_weights(base), parameter_weights(model)
    if (old.files is None) != (tuned.files is None):
        old, tuned = loaded_weights(base), loaded_weights(model)
    _check_alike(old, tuned)
    check_configurations(base, model)
    dtype = _common_type(old, tuned)
    changed = changes(old.read, tuned.read, sorted(tuned.specs))
    empty = empty_model(base)
    if buffers := sorted(changed.keys() - {name for name, _ in empty.named_parameters()}):
        raise UserError(f"{model} differs from {base} in {buffers[0]}, which is no parameter; a delta cannot hold it.")
    if not changed:
        raise UserError(f"{model} has the very weights of {base}: there is no change to extract.")
    fingerprint = model_fingerprint(base)
    about = {
        "made_by": "dualsft export extract",
        "base": describe_base(base, fingerprint, dtype),
        "counts": {"changed": sum(len(index) for index, _ in changed.values()), "all": num_weights(empty)},
        "versions": versions(),
    }
    return lambda folder: write_delta(folder / "delta.safetensors", changed, fingerprint, about)


def _check_alike(old: Weights, tuned: Weights) -> None:
    """Refuse two checkpoints that do not hold the same tensors.

    Raises:
        UserError: naming the first that differs.
    """
    for name in sorted(old.specs.keys() | tuned.specs.keys()):
        if name not in old.specs or name not in tuned.specs:
            has, lacks = (old, tuned) if name in old.specs else (tuned, old)
            raise UserError(f"{has.folder} has {name} and {lacks.folder} has not; give two checkpoints of one model.")
        before, after = old.specs[name], tuned.specs[name]
        if before.shape != after.shape:
            raise UserError(
                f"{name} has shape {before.shape} in {old.folder} and {after.shape} in {tuned.folder}; give two "
                "checkpoints of one model."
            )


def _common_type(old: Weights, tuned: Weights) -> str:
    """The type that the base is to be loaded in to differ from the tuned model by a delta alone.

    Raises:
        UserError: if there is no one such type.
    """
    names = float_types(tuned)
    same = all(old.specs[name].dtype == spec.dtype for name, spec in tuned.specs.items())
    if not same and not (len(names) == 1 and names <= set(get_args(Dtype))):
        raise UserError(
            f"{tuned.folder} stores its weights as {', '.join(sorted(names))}, {old.folder} otherwise; store both in "
            "one type."
        )
    return names.pop() if len(names) == 1 else "auto"
