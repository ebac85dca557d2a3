"""Whether two checkpoints differ by a delta alone: the same tensors, and configurations of the same model."""

from typing import get_args

from dualsft.errors import UserError
from dualsft.export.delta import dtype_name
from dualsft.models import PreTrainedModel
from dualsft.models.configuration import differing_settings
from dualsft.models.loading import Dtype, empty_model
from dualsft.models.stored import Weights


def check_configurations(base: str, model: str) -> None:
    """Refuse two models, folders or hub ids, that compute different things from the same weights."""
    if differing := _differing(empty_model(base), empty_model(model)):
        raise UserError(
            f"{model} and {base} have different settings in config.json ({', '.join(differing)}), and a delta holds "
            "weights alone; give two checkpoints of one model."
        )


def _differing(one: PreTrainedModel, other: PreTrainedModel) -> list[str]:
    kinds = ["architectures"] if _special(one) != _special(other) else []
    settings = differing_settings(one.config, other.config)
    return settings if settings == ["model_type"] else kinds + settings


def _special(model: PreTrainedModel) -> set[str]:
    """The classes that a configuration names, except the loaded class and its base without a head."""
    usual = {type(model).__name__, type(model.base_model).__name__}
    return set(model.config.architectures or ()) - usual


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
