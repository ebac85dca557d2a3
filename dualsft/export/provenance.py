"""The record of how a delta was made: base, selection, training and versions, for the delta's metadata and model card.

It holds nothing that differs between two runs of one configuration, and only the last names of files and folders: what
is published should not show local paths.
"""

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning import Trainer

from dualsft.data.module import InstructionDataModule
from dualsft.data.sources import paths_of

_OF_A_SCORER = ("scorer", "step_size")
"""What takes no part in scores along a path that has directions of its own."""
_OF_STATISTICS = ("preconditioner", "prior", "normalize")
"""What takes no part in scores that are falls of the loss either."""
_PACKAGES = ("dualsft", "torch", "transformers", "lightning", "safetensors")


def published_name(name_or_path: str) -> str:
    """Return a hub id unchanged, and a path's last component."""
    path = Path(name_or_path).expanduser()
    is_local = path.exists() or name_or_path.startswith(("/", ".", "~")) or name_or_path.count(os.sep) > 1
    return path.resolve().name if is_local else name_or_path


def describe_base(name_or_path: str, fingerprint: str, dtype: str) -> dict[str, Any]:
    """The base model, and the type that its weights were loaded in."""
    local = Path(name_or_path).expanduser().exists()
    return {"name": published_name(name_or_path), "local": local, "fingerprint": fingerprint, "dtype": dtype}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def describe_selection(manifest: Mapping[str, Any], published: Sequence[str]) -> dict[str, Any]:
    """What was selected and how: these keys of a selection's manifest, missing ones left out."""
    record = {key: manifest[key] for key in published if manifest.get(key) is not None}
    if checkpoint := record["warmup"].get("checkpoint"):
        record["warmup"] = {**record["warmup"], "checkpoint": published_name(checkpoint)}
    if (prediction := manifest["prediction"]) is not None:
        record["prediction"] = {key: prediction[key] for key in ("step_size", "predicted_improvement")}
    else:  # along a path with directions of its own
        falls = any("pool" in walked for walked in (manifest["path_walked"] or {}).values())
        without = (*_OF_A_SCORER, *_OF_STATISTICS) if falls else _OF_A_SCORER
        record = {key: value for key, value in record.items() if key not in without}
    record["data"] = {name: _describe_data(manifest["data"][name]) for name in ("train", "validation")}
    return record


def _describe_data(source: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Describe a source by name, fingerprint and rows; named validation sets one by one."""
    if not isinstance(source.get("fingerprint"), str):
        return [{"set": name, **_describe_data(one)[0]} for name, one in source.items()]
    paths = paths_of(source.get("path"))
    name = {"name": ", ".join(map(published_name, paths))} if all(paths) and paths else {}
    return [name | {key: source[key] for key in ("fingerprint", "rows", "supervised_tokens") if key in source}]


def describe_training(trainer: Trainer) -> dict[str, Any]:
    """How the model was trained: optimizer, schedule, epochs, steps, the prior if there was one, batches and data."""
    data, prior = getattr(trainer, "datamodule", None), getattr(trainer.lightning_module, "training_prior", None)
    return {
        "optimizer": [_describe_optimizer(optimizer) for optimizer in trainer.optimizers],
        "lr_scheduler": [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs],
        "epochs": trainer.current_epoch,
        "optimizer_steps": trainer.global_step,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "precision": str(trainer.precision),
        "training_prior": asdict(prior) if prior and prior.weight else None,
        **(_describe_batches(data) if isinstance(data, InstructionDataModule) else {}),
    }


def _describe_optimizer(optimizer: Any) -> dict[str, Any]:
    numbers = (int, float, tuple)
    plain = {k: v for k, v in optimizer.defaults.items() if isinstance(v, numbers) and not isinstance(v, bool)}
    return {"name": type(optimizer).__name__, **plain}


def _describe_batches(data: InstructionDataModule) -> dict[str, Any]:
    records = data.train_examples.records
    return {
        **{key: getattr(data, key) for key in ("max_length", "batch_tokens", "batch_size", "packing", "seed")},
        "examples": len(data.training_ids()),
        "data": _describe_data({"path": data.train, "fingerprint": records.fingerprint, "rows": len(records)}),
    }
