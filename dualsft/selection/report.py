"""What the manifest says of a run: its inputs, its outcome, and the sum identity that checks both score vectors."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dualsft.data import Examples, InstructionDataModule
from dualsft.errors import UserError
from dualsft.gradients import GradientPass, compute_dtype
from dualsft.models import model_fingerprint, tokenizer_fingerprint
from dualsft.selection.moments import describe_checkpoint

if TYPE_CHECKING:
    from dualsft.selection.module import SelectionModule

_PACKAGES = ("dualsft", "torch", "transformers", "lightning", "datasets", "tokenizers", "safetensors")
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_PRECISION_TOLERANCE = 2e-2


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
            "train": _describe_examples(data.train, data.train_examples),
            "validation": _describe_examples(data.validation, data.validation_sets["validation"]),
            "max_length": data.max_length,
            "batch_tokens": data.batch_tokens,
            "batch_size": data.batch_size,
            "packing": data.packing,
            "padding_share": data.padding_share(),
            "format": asdict(data.options),
        },
        "warmup": asdict(module.warmup),
        "scorer": _describe(module.scorer),
        "preconditioner": module.preconditioner,
        "token_scores": module.token_scores,
        "step_size": module.step_size,
        "parameter_allocator": _describe(module.parameter_allocator),
        "data_allocator": _describe(module.data_allocator),
        "budgets": {"parameters": module.parameter_budget, "data": module.data_budget},
        "seed": seed,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe_examples(path: str | dict[str, str] | None, examples: Examples) -> dict[str, Any]:
    return {
        "path": path,
        "fingerprint": examples.records.fingerprint,
        "rows": len(examples.records),
        "supervised_tokens": int(sum(examples.num_tokens)),
        "status": dict(examples.counts()),
    }


def _describe(part: object) -> dict[str, Any]:
    kind = type(part)
    options = {name: value for name, value in vars(part).items() if not name.startswith("_")}
    return {
        "class_path": f"{kind.__module__}.{kind.__qualname__}",
        "options": json.loads(json.dumps(options, default=str)),
    }


def sum_identity(rows: Mapping[int, float], scores: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Both sides of Σ_i φ_i = Σ_j φ_j, the predicted improvement, and how far apart they are.

    The difference is told relative to Σ_j |φ_j|, the size of the numbers that were added.

    Raises:
        UserError: if they differ by more than rounding: then the scores are wrong, and nothing may be built on them.
    """
    row_sum = math.fsum(rows.values())
    column_sum = math.fsum(float(score.sum(dtype=torch.float64)) for score in scores.values())
    scale = math.fsum(float(score.abs().sum(dtype=torch.float64)) for score in scores.values())
    difference = abs(row_sum - column_sum) / scale if scale else 0.0
    tolerance = _TOLERANCE.get(dtype, _HALF_PRECISION_TOLERANCE)
    if not difference <= tolerance:
        raise UserError(
            f"The example scores add up to {row_sum:.6g} and the parameter scores to {column_sum:.6g}, which must be "
            f"the same number (difference {difference:.2g} of the scores' size, {tolerance:g} allowed for {dtype}); "
            "the model uses a weight in a way that cannot be seen from its module, or the gradients overflow: please "
            "report it."
        )
    return {"row_sum": row_sum, "column_sum": column_sum, "relative_difference": difference, "tolerance": tolerance}


def describe_outcome(
    pool: Examples, scored: GradientPass, chosen: set[int], mask: Mapping[str, Tensor], identity: dict[str, float]
) -> dict[str, Any]:
    """What was scored and chosen, how well the sums agree, and with which versions."""
    return {
        "counts": {
            "examples": {"selected": len(chosen), "scored": len(scored.rows[0]), "rows": len(pool.status)},
            "parameters": {
                "selected": sum(int(chosen.sum()) for chosen in mask.values()),
                "scored": sum(chosen.numel() for chosen in mask.values()),
            },
        },
        "sum_identity": identity,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
    }
