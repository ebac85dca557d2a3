"""The record of how a delta was made: base, selection, training and versions, for the delta's metadata and model card.

It holds nothing that differs between two runs of one configuration, and only the last names of files and folders: what
is published should not show anybody's disk.
"""

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import Trainer

from dualsft.data import InstructionDataModule

_PACKAGES = ("dualsft", "torch", "transformers", "lightning", "safetensors")
_SELECTION = (
    *("scorer", "preconditioner", "step_size", "warmup", "prior", "objectives", "combination", "order"),
    *("parameter_allocator", "data_allocator", "near_duplicates", "trainable", "frozen", "budgets", "counts"),
    *("coverage", "control", "seed"),
)
_PREDICTED = ("step_size", "predicted_improvement")


def published_name(name_or_path: str) -> str:
    """A hub id unchanged; the last name of a file or folder."""
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


def describe_selection(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What was selected and how, from a selection's manifest; keys that it does not have are left out."""
    record = {key: manifest[key] for key in _SELECTION if manifest.get(key) is not None}
    if isinstance(warmup := record.get("warmup"), Mapping) and warmup.get("checkpoint"):
        record["warmup"] = {**warmup, "checkpoint": published_name(warmup["checkpoint"])}
    if prediction := manifest.get("prediction"):
        record["prediction"] = {key: prediction[key] for key in _PREDICTED if key in prediction}
    record["data"] = {name: _describe_data(manifest.get("data", {}).get(name)) for name in ("train", "validation")}
    return record


def _describe_data(source: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Name, fingerprint and rows of a source, or of each named validation set."""
    if not source:
        return []
    if "fingerprint" not in source:
        return [{"set": name, **_describe_data(one)[0]} for name, one in source.items()]
    kept = {key: source[key] for key in ("fingerprint", "rows", "supervised_tokens") if key in source}
    return [{**({"name": published_name(source["path"])} if source.get("path") else {}), **kept}]


def describe_training(trainer: Trainer) -> dict[str, Any]:
    """How the model was trained: optimizer, schedule, epochs, steps, batches and data."""
    data = getattr(trainer, "datamodule", None)
    return {
        "optimizer": [_describe_optimizer(optimizer) for optimizer in trainer.optimizers],
        "lr_scheduler": [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs],
        "epochs": trainer.current_epoch,
        "optimizer_steps": trainer.global_step,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "precision": str(trainer.precision),
        **(_describe_batches(data) if isinstance(data, InstructionDataModule) else {}),
    }


def _describe_optimizer(optimizer: Any) -> dict[str, Any]:
    numbers = (int, float, tuple)
    plain = {k: v for k, v in optimizer.defaults.items() if isinstance(v, numbers) and not isinstance(v, bool)}
    return {"name": type(optimizer).__name__, **plain}


def _describe_batches(data: InstructionDataModule) -> dict[str, Any]:
    examples = data.train_examples
    return {
        **{key: getattr(data, key) for key in ("max_length", "batch_tokens", "batch_size", "packing", "seed")},
        "examples": len(data.training_ids()),
        "data": _describe_data(
            {"path": data.train, "fingerprint": examples.records.fingerprint, "rows": len(examples.records)}
        ),
    }
