"""Whether two checkpoints' configurations make the same model of the same weights.

They are compared as the library reads them, with its defaults filled in and old names of settings replaced. What is not
known to the model stands in one of the files alone, or is among what says nothing of how the model computes.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedModel

from dualsft.errors import UserError
from dualsft.models.loading import empty_model

_IDLE = re.compile(
    r"_name_or_path|architectures|(torch_)?dtype|use_cache|output_\w+|return_dict|\w+_version|problem_type"
    r"|id2label|label2id|(bos|eos|pad)_token_id"  # for who prepares the input and ends the output
    r"|initializer_range|\w*(dropout|pdrop)|router_(aux_loss_coef|jitter_noise)"  # for training alone
    r"|chunk_size_feed_forward|pretraining_tp"  # how to compute the same
)


def check_configurations(base: str, model: str) -> None:
    """Refuse two models that compute different things from the same weights.

    Args:
        base: The base model's folder or hub id.
        model: The tuned model's folder or hub id.

    Raises:
        UserError: naming the settings that differ, or if a configuration cannot be read.
    """
    if differing := _differing(empty_model(base), empty_model(model)):
        raise UserError(
            f"{model} and {base} have different settings in config.json ({', '.join(differing)}), and a delta holds "
            "weights alone; give two checkpoints of one model."
        )


def _differing(one: PreTrainedModel, other: PreTrainedModel) -> list[str]:
    before, after = one.config.to_dict(), other.config.to_dict()
    if before["model_type"] != after["model_type"]:
        return ["model_type"]  # of another kind all settings are others
    kinds = ["architectures"] if _special(one) != _special(other) else []
    shared = before.keys() & after.keys()
    first, second = (dict(_settings({key: given[key] for key in shared})) for given in (before, after))
    keys = first.keys() | second.keys()
    return kinds + sorted(key for key in keys if first.get(key) != second.get(key))


def _special(model: PreTrainedModel) -> set[str]:
    """The classes that a configuration names, beside the one that is loaded and that without its head."""
    usual = {type(model).__name__, type(model.base_model).__name__}
    return set(model.config.architectures or ()) - usual


def _settings(given: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Settings that matter, by their names, those of parts after the part's."""
    for key, value in given.items():
        if isinstance(value, Mapping) and not _IDLE.fullmatch(key):
            yield from _settings(value, f"{above}{key}.")
        elif not _IDLE.fullmatch(str(key)):
            yield f"{above}{key}", value
