"""Whether two configurations make the same model: they are compared as the library reads them.

Its defaults are filled in, and old names of settings replaced. Settings that the model does not know, that one
configuration lacks, or that do not change the model's results are left out.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

_IRRELEVANT = re.compile(
    r"_name_or_path|architectures|(torch_)?dtype|use_cache|output_\w+|return_dict|\w+_version|problem_type"
    r"|id2label|label2id|(bos|eos|pad)_token_id"  # for tokenizers and generation
    r"|initializer_range|\w*(dropout|pdrop)|router_(aux_loss_coef|jitter_noise)"  # only for training
    r"|chunk_size_feed_forward|pretraining_tp"  # the same result, computed in another way
)


def differing_settings(one: PretrainedConfig, other: PretrainedConfig) -> list[str]:
    """The dotted names of the settings in which two configurations differ, such as ``rope_parameters.factor``."""
    before, after = one.to_dict(), other.to_dict()
    if before["model_type"] != after["model_type"]:
        return ["model_type"]  # all other settings differ as well
    shared = before.keys() & after.keys()
    first, second = (dict(_settings({key: config[key] for key in shared})) for config in (before, after))
    return sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if _IRRELEVANT.fullmatch(str(key)):
            continue
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def stored_configuration(folder: Path) -> dict[str, Any]:
    """The settings in a model folder's ``config.json`` that may change the model's results."""
    stored: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in stored.items() if not _IRRELEVANT.fullmatch(key)}


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings in which two results of `stored_configuration` differ.

    They are compared as this release of the library reads them, so that saving a model again changes nothing.
    """
    by_key = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    kinds = {str(stored.get("model_type")) for stored in (before, now)}
    if len(kinds) > 1 or not kinds <= set(CONFIG_MAPPING.keys()):
        return by_key
    kind = CONFIG_MAPPING[kinds.pop()]
    try:
        return differing_settings(*(kind.from_dict(dict(stored)) for stored in (before, now)))
    except Exception:  # the library has a kind of exception for each setting that it refuses
        return by_key
