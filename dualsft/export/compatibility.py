"""Whether two checkpoints differ by a delta alone: the same tensors, and configurations of the same model.

Configurations are compared as the library reads them, with its defaults filled in and old names of settings replaced.
Settings that the model does not know, that one file lacks, or that do not change the model's results are left out.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from dualsft.errors import UserError
from dualsft.export.delta import dtype_name
from dualsft.models import PreTrainedModel
from dualsft.models.loading import Dtype, empty_model
from dualsft.models.stored import Weights

_IRRELEVANT = re.compile(
    r"_name_or_path|architectures|(torch_)?dtype|use_cache|output_\w+|return_dict|\w+_version|problem_type"
    r"|id2label|label2id|(bos|eos|pad)_token_id"  # for tokenizers and generation
    r"|initializer_range|\w*(dropout|pdrop)|router_(aux_loss_coef|jitter_noise)"  # only for training
    r"|chunk_size_feed_forward|pretraining_tp"  # the same result, computed in another way
)


def check_configurations(base: str, model: str) -> None:
    """Refuse two models, folders or hub ids, that compute different things from the same weights."""
    if differing := _differing(empty_model(base), empty_model(model)):
        raise UserError(
            f"{model} and {base} have different settings in config.json ({', '.join(differing)}), and a delta holds "
            "weights alone; give two checkpoints of one model."
        )


def _differing(one: PreTrainedModel, other: PreTrainedModel) -> list[str]:
    before, after = one.config.to_dict(), other.config.to_dict()
    if before["model_type"] != after["model_type"]:
        return ["model_type"]  # all other settings differ as well
    kinds = ["architectures"] if _special(one) != _special(other) else []
    shared = before.keys() & after.keys()
    first, second = (dict(_settings({key: config[key] for key in shared})) for config in (before, after))
    keys = first.keys() | second.keys()
    return kinds + sorted(key for key in keys if first.get(key) != second.get(key))


def _special(model: PreTrainedModel) -> set[str]:
    """The classes that a configuration names, except the loaded class and its base without a head."""
    usual = {type(model).__name__, type(model.base_model).__name__}
    return set(model.config.architectures or ()) - usual


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the settings that matter with their dotted names: ``rope_scaling.factor``."""
    for key, value in config.items():
        if _IRRELEVANT.fullmatch(str(key)):
            continue
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_same_tensors(old: Weights, tuned: Weights) -> None:
    """Refuse two checkpoints that do not hold the same tensors, and name the first that differs."""
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


def float_types(weights: Weights) -> set[str]:
    """The names of the floating types in use."""
    return {dtype_name(spec.dtype) for spec in weights.specs.values() if spec.dtype.is_floating_point}


def common_type(old: Weights, tuned: Weights) -> str:
    """The type to load the base in so that only a delta separates it from the tuned model; refuses if there is none."""
    names = float_types(tuned)
    same = all(old.specs[name].dtype == spec.dtype for name, spec in tuned.specs.items())
    if not same and not (len(names) == 1 and names <= set(get_args(Dtype))):
        raise UserError(
            f"{tuned.folder} stores its weights as {', '.join(sorted(names))}, {old.folder} otherwise; store both in "
            "one type."
        )
    return names.pop() if len(names) == 1 else "auto"
