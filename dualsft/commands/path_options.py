"""The options that are paths: what they mean is the same in all of them, on the command line and in configurations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from dualsft.data.options import validation_key
from dualsft.data.sources import with_paths
from dualsft.errors import naming
from dualsft.storage.paths import check_writable, expanded

VALIDATION = validation_key(None)
OURS = (
    *("output_dir", "selection", "task_folder", "model.model_name_or_path", "model.selection"),
    *("model.warmup.checkpoint", "data.train", "data.validation", "data.tokenizer", "data.selection"),
    "data.cache_dir",
    *("base", "model", "delta"),
)
"""Keys whose value is a path or a name on the hub, or sources of data, which hold such."""
WRITTEN_BY_LIGHTNING = ("dirpath", "save_dir")
LIGHTNINGS = ("default_root_dir", *WRITTEN_BY_LIGHTNING)
"""Names of options of Lightning's trainer, loggers and callbacks."""


def expand_paths(config: Namespace) -> Namespace:
    """Write out ``~`` and environment variables in every path of a parsed configuration, in place.

    Raises:
        UserError: if one is no path, or a folder that Lightning is to write to cannot be written; the key is named.
    """
    for key in OURS:
        if isinstance(value := config.get(key), (str, list, dict)):
            config[key] = _sources(key, value)
    if "trainer" in config:
        _walk("trainer", config.trainer, _of_lightning)
    return config


def _sources(key: str, value: Any) -> Any:
    if key == VALIDATION and isinstance(value, dict):  # every key is a set's name, path too
        return {name: with_paths(one, _expanded, f"{key}.{name}") for name, one in value.items()}
    return with_paths(value, _expanded, key)


def _expanded(key: str, value: Any) -> Any:
    if not isinstance(value, str) or "://" in value:
        return value
    with naming(key):
        return expanded(value)


def _of_lightning(key: str, name: str, value: Any) -> Any:
    if name not in LIGHTNINGS or not isinstance(value, str):
        return value
    full = _expanded(key, value)
    if name in WRITTEN_BY_LIGHTNING and "://" not in full:
        check_writable(Path(full), key)
    return full


def _walk(key: str, value: Any, change: Callable[[str, str, Any], Any]) -> None:
    """Replace values anywhere in a section by those that ``change`` makes of (key, last name of it, value)."""
    if isinstance(value, list):
        for part in value:
            _walk(key, part, change)
    elif isinstance(value, (dict, Namespace)):
        for name, part in list(vars(value).items() if isinstance(value, Namespace) else value.items()):
            value[name] = change(f"{key}.{name}", name, part)
            _walk(f"{key}.{name}", part, change)
