"""What the manifest says of a run: its inputs and its outcome."""

import importlib.metadata
import platform
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from dualsft.data import Examples, InstructionDataModule
from dualsft.matrix.passes import compute_dtype
from dualsft.models.loading import model_fingerprint, tokenizer_fingerprint
from dualsft.selection.order import Chosen
from dualsft.selection.parts import describe_part
from dualsft.selection.scoring import Scoring
from dualsft.selection.scoring_checkpoint import describe_checkpoint

if TYPE_CHECKING:
    from dualsft.selection.module import SelectionModule

_PACKAGES = ("dualsft", "torch", "transformers", "lightning", "datasets", "tokenizers", "safetensors")


def describe_inputs(module: "SelectionModule", data: InstructionDataModule, seed: int) -> dict[str, Any]:
    """Everything that decides the outcome; a resumed run must agree with it."""
    checkpoint = module.warmup.checkpoint
    return {
        "model": {
            "name_or_path": module.model_name_or_path,
            "fingerprint": model_fingerprint(module.model_name_or_path),
            "num_parameters": sum(p.numel() for p in module.model.parameters()),
            "dtype": _name(module.model.dtype),
            "compute_dtype": _name(compute_dtype(module.model)),
        },
        "scoring_checkpoint": describe_checkpoint(checkpoint) if checkpoint else None,
        "tokenizer": {"fingerprint": tokenizer_fingerprint(data.tokenizer)},
        "data": {
            "train": {**_describe_examples(data.train, data.train_examples), "split": data.train_split},
            "validation": _describe_validation(data),
            "max_length": data.max_length,
            "batch_tokens": data.batch_tokens,
            "batch_size": data.batch_size,
            "packing": data.packing,
            "padding_share": data.padding_share(),
            "format": asdict(data.options),
        },
        "warmup": asdict(module.warmup),
        "prior": asdict(module.prior),
        "objectives": [{**describe_part(o), "name": o.name, "weight": o.weight} for o in module.objectives],
        "combination": module.combination,
        "order": {"name": module.order, "rounds": module.rounds},
        "scorer": describe_part(module.scorer),
        "preconditioner": module.preconditioner,
        "token_scores": module.token_scores,
        "step_size": module.step_size,
        "parameter_allocator": describe_part(module.parameter_allocator),
        "data_allocator": describe_part(module.data_allocator),
        "near_duplicates": asdict(module.near_duplicates),
        "trainable": module.trainable,
        "frozen": module.frozen,
        "budgets": {"parameters": module.parameter_budget, "data": module.data_budget},
        "seed": seed,
    }


CHOICE = ("parameter_allocator", "data_allocator", "near_duplicates", "trainable", "frozen", "budgets")
"""Of the inputs those that say what is chosen by the scores."""


def what_scores_rest_on(module: "SelectionModule", inputs: dict[str, Any]) -> dict[str, Any]:
    """Of the inputs those that decide the scores, which another choice can be made from.

    A choice counts where the other side is scored by it. A step size that turns out to be of no use may be changed too:
    `Phases.bind` binds the run to one.
    """
    free = {"step_size"} if "then" in module.order else {"step_size", *CHOICE}
    measured = {"measured": sorted(module.data_allocator.needs)}
    return {**{key: value for key, value in inputs.items() if key not in free}, **measured}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe_examples(path: str | None, examples: Examples) -> dict[str, Any]:
    return {
        "path": path,
        "fingerprint": examples.records.fingerprint,
        "rows": len(examples.records),
        "supervised_tokens": int(sum(examples.num_tokens)),
        "status": dict(examples.counts()),
    }


def _describe_validation(data: InstructionDataModule) -> dict[str, Any]:
    """The one validation set, or each by its name."""
    if isinstance(data.validation, dict):
        return {name: _describe_examples(data.validation[name], of) for name, of in data.validation_sets.items()}
    return _describe_examples(data.validation, data.validation_sets["validation"])


def describe_outcome(pool: Examples, chosen: Chosen, scoring: Scoring, named: bool) -> dict[str, Any]:
    """What was scored and chosen, how well the sums agree, what is predicted, and with which versions.

    Args:
        pool: The examples.
        chosen: What was scored and chosen.
        scoring: Tells of the sums and the prediction.
        named: Whether each validation set is told of by its name.
    """
    identities = list(scoring.identity.values())
    worst = max(identities, key=lambda of: of["relative_difference"])
    return {
        "counts": {
            "examples": {
                "selected": len(chosen.examples),
                "scored": len(chosen.example_scores.scores),
                "near_duplicates": chosen.collapsed,
                "rows": len(pool.status),
            },
            "parameters": {
                "selected": sum(int(mask.sum()) for mask in chosen.mask.values()),
                "scored": sum(mask.numel() for mask in chosen.mask.values()),
            },
        },
        "sum_identity": {**worst, "sets": scoring.identity} if named else worst,
        "prediction": scoring.prediction(named),
        "rounds": chosen.rounds,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
    }
