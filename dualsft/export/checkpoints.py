"""Applying a delta to its base, reverting that, and extracting the delta of two checkpoints.

Models are given as folders or hub ids, deltas as files. Each ``prepare_`` function checks everything that can be wrong,
and returns a function that writes the result into an empty folder. Where the files hold the parameters under the
model's own names, both steps read one tensor at a time and write file by file, divided into files as the base is;
memory holds one parameter, and in `prepare_extract` the delta. Otherwise (see `dualsft.models.stored`), or where the
delta's values are of another type than the stored base, the model is loaded.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast, get_args

from torch import Tensor

from dualsft.data.tokenizer import load_tokenizer
from dualsft.errors import UserError
from dualsft.export.compatibility import check_configurations, check_same_tensors, common_type, float_types
from dualsft.export.delta import (
    Delta,
    apply_delta,
    changes,
    dtype_name,
    find_changes,
    open_delta,
    patched,
    write_delta,
)
from dualsft.export.model_card import write_card
from dualsft.export.provenance import describe_base, versions
from dualsft.export.whole import CONFIG, INDEX, Whole, whole_of
from dualsft.models import PreTrainedModel
from dualsft.models.loading import Dtype, empty_model, load_model, model_fingerprint, model_folder
from dualsft.models.stored import Weights, has_own_names, loaded_weights, parameter_weights, stored_weights
from dualsft.models.tensor_file import write_tensors
from dualsft.sharding.groups import world_size
from dualsft.sharding.save import save_sharded
from dualsft.sharding.shard_model import is_sharded

Writer = Callable[[Path], None]
"""Writes a result into an empty folder."""

COMPANIONS = ("generation_config.json", "*processor_config.json", "chat_template.json")
"""What is copied beside the weights: generation settings, and what a processor of images, video or sound needs."""


def prepare_apply(base: str, delta: str) -> Writer:
    """The tuned model, as a Hugging Face folder.

    Raises:
        UserError: if either cannot be read, they do not belong together, or the base has no tokenizer.
    """
    change, stored = open_delta(Path(delta)), stored_weights(model_folder(base))
    load_tokenizer(base)
    about = check_pair(change, base)
    if has_own_names(stored) and _keeps_types(change, stored):
        change.check_entries(stored.specs, base)

        def read(name: str) -> Tensor:
            tensor = stored.read(name)
            return patched(tensor, change.change(name)) if name in change.counts else tensor

        return _model_writer(lambda folder: _write_files(stored, read, folder), base, about)
    dtype = loaded_type(change)
    whole = whole_of(base)
    model = load_model(base, cast(Dtype, dtype) if dtype in get_args(Dtype) else "auto")
    apply_delta(change.path, model, change.base_fingerprint)
    return _model_writer(lambda folder: save_weights(model, folder, whole), base, about)


def _keeps_types(change: Delta, stored: Weights) -> bool:
    """Whether the delta was made with every weight in the type that it is stored in."""
    specs = stored.specs
    alike = all(name not in specs or specs[name].dtype == dtype for name, dtype in change.value_types.items())
    return alike and (loaded_type(change) == "auto" or float_types(stored) == {loaded_type(change)})


def check_pair(change: Delta, base: str) -> dict[str, Any]:
    """Refuse a change that belongs to another base, and return the record of how it was made."""
    change.check_base(fingerprint := model_fingerprint(base), base)
    counts = {"changed": sum(change.counts.values()), "all": empty_model(base).num_parameters()}
    return {
        **change.about,
        "base": {**describe_base(base, fingerprint, loaded_type(change)), **change.about.get("base", {})},
        "counts": {**change.about.get("counts", {}), **counts},
    }


def loaded_type(change: Delta) -> str:
    """The type to load a delta's base in: the one that the delta names, otherwise that of its values."""
    names = {dtype_name(dtype) for dtype in change.value_types.values()}
    return str(change.about.get("base", {}).get("dtype") or (names.pop() if len(names) == 1 else "auto"))


def _model_writer(write_weights: Writer, base: str, about: Mapping[str, Any]) -> Writer:
    """Writes the weights, the base's other files and, if anything is known of the change, a model card."""

    def write(folder: Path) -> None:
        write_weights(folder)
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
        shutil.copyfile(layout.folder / INDEX, folder / INDEX)


def prepare_revert(model: str, base: str, delta: str) -> Writer:
    """The base model, restored from a tuned one; only the changed entries' old values are read from the base.

    Raises:
        UserError: if one cannot be read, they do not belong together, or the result is not the base's weights, because
            the model differs from the base elsewhere too, or was rounded to a narrower type.
    """
    change = open_delta(Path(delta))
    change.check_base(model_fingerprint(base), base)
    load_tokenizer(base)
    stored = stored_weights(model_folder(base))
    old, tuned = stored, stored_weights(model_folder(model))
    if not (has_own_names(old) and tuned.specs.keys() == old.specs.keys()):
        old, tuned = loaded_weights(base), loaded_weights(model)  # the files hold other names than the delta
    check_same_tensors(old, tuned)
    change.check_entries(old.specs, base)

    def read(name: str) -> Tensor:
        tensor = tuned.read(name).to(old.specs[name].dtype)
        if name not in change.counts:
            return tensor
        index, _ = change.change(name)
        return patched(tensor, (index, old.read(name).flatten()[index]))

    if any(changes(old.read, read, old.specs)):
        raise UserError(
            f"{model} without the delta's change does not have the weights of {base}: it was made from another model, "
            "trained further, or rounded to a narrower type; give the model that the delta led to."
        )
    return _model_writer(lambda folder: _write_files(stored, stored.read, folder), base, {})


def prepare_extract(base: str, model: str) -> Writer:
    """A ``delta.safetensors`` that turns the base into the tuned model.

    Raises:
        UserError: if one cannot be read, they do not make the same model of the same weights, nothing differs, or
            something differs that is not a parameter.
    """
    old, tuned = parameter_weights(base), parameter_weights(model)
    if (old.files is None) != (tuned.files is None):
        old, tuned = loaded_weights(base), loaded_weights(model)
    check_same_tensors(old, tuned)
    check_configurations(base, model)
    _check_rest(base, model)
    dtype = common_type(old, tuned)
    changed = find_changes(old.read, tuned.read, sorted(tuned.specs))
    empty = empty_model(base)
    if buffers := sorted(changed.counts.keys() - {name for name, _ in empty.named_parameters()}):
        raise UserError(f"{model} differs from {base} in {buffers[0]}, which is no parameter; a delta cannot hold it.")
    if not changed.counts:
        raise UserError(f"{model} has the very weights of {base}: there is no change to extract.")
    fingerprint = model_fingerprint(base)
    about = {
        "made_by": "dualsft export extract",
        "base": describe_base(base, fingerprint, dtype),
        "counts": {"changed": sum(changed.counts.values()), "all": empty.num_parameters()},
        "versions": versions(),
    }
    return lambda folder: write_delta(folder / "delta.safetensors", changed, fingerprint, about)


def _check_rest(base: str, model: str) -> None:
    """Refuse two checkpoints that differ in what is no part of their language model, as far as both have it alike."""
    if (whole := whole_of(base)) is None:
        return
    old, other = whole.base, stored_weights(model_folder(model))
    shared = sorted(name for name in whole.rest if other.specs.get(name) == old.specs[name])
    if (differing := next(changes(old.read, other.read, shared), None)) is not None:
        raise UserError(
            f"{model} differs from {base} in {differing[0]}, which is no part of the language model; a delta cannot "
            "hold it."
        )


def save_weights(model: PreTrainedModel, folder: Path, whole: Whole | None = None) -> None:
    """Write a model as a Hugging Face folder, with what its base has beside it if that is given.

    Every rank must call this.
    """
    if whole is not None:
        whole.write(model, folder)
    elif is_sharded(model) or world_size() > 1:
        save_sharded(model, folder)
    else:
        model.save_pretrained(folder)


def copy_companions(base: str, folder: Path) -> None:
    """Write the base's tokenizer, and copies of its generation settings and of its processor's files.

    Raises:
        UserError: if the base has no tokenizer.
    """
    load_tokenizer(base).save_pretrained(folder)
    for pattern in COMPANIONS:
        for source in model_folder(base).glob(pattern):
            shutil.copyfile(source, folder / source.name)
