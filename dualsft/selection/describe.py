"""Writes down a selection: what it rests on and what came out, as sections of the manifest."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from dualsft.data.examples import Examples
from dualsft.data.module import InstructionDataModule
from dualsft.data.options import validation_sources
from dualsft.data.sources import Given
from dualsft.matrix.passes import compute_dtype
from dualsft.models.configuration import stored_configuration
from dualsft.models.loading import Dtype, model_fingerprint, model_folder, special_tokens, tokenizer_fingerprint
from dualsft.selection.manifest import DataSection, ExampleCounts, ModelSection, ParameterCounts, Source, TrainSource
from dualsft.selection.order import Chosen
from dualsft.selection.outcome import Outcome
from dualsft.selection.scoring_checkpoint import describe_checkpoint
from dualsft.selection.settings import describe_settings, keys

if TYPE_CHECKING:
    from dualsft.selection.module import SelectionModule

_PACKAGES = ("dualsft", "torch", "transformers", "lightning", "datasets", "tokenizers", "safetensors")


def describe_inputs(module: "SelectionModule", data: InstructionDataModule, seed: int) -> dict[str, Any]:
    """Everything that decides the outcome; a resumed run must agree with it."""
    checkpoint = module.settings.warmup.checkpoint
    model = ModelSection(
        name_or_path=module.model_name_or_path,
        fingerprint=model_fingerprint(module.model_name_or_path),
        num_parameters=sum(p.numel() for p in module.model.parameters()),
        dtype=cast(Dtype, str(module.model.dtype).removeprefix("torch.")),
        compute_dtype=str(compute_dtype(module.model)).removeprefix("torch."),
    )
    return {
        "model": asdict(model),
        "scoring_checkpoint": describe_checkpoint(checkpoint) if checkpoint else None,
        "tokenizer": {"fingerprint": tokenizer_fingerprint(data.tokenizer)},
        "data": asdict(_data(data)),
        **describe_settings(module.settings),
        "seed": seed,
    }


def what_scores_rest_on(module: "SelectionModule", inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs that decide the scores; another choice from the same scores must leave them as they are.

    An option of a choice is among them if the other side is scored by that choice. A step size that turns out to be
    unusable may still be changed until scores depend on it.
    """
    choice = [] if "then" in module.settings.order else keys("parameters", "data")
    free = {*keys("step"), *choice}
    measured = {"measured": sorted(module.settings.data_allocator.needs)}
    unscored = {} if module.settings.scores_weights else {"weights": "not scored"}
    return {**{key: value for key, value in inputs.items() if key not in free}, **measured, **unscored}


def describe_configuration(module: "SelectionModule", data: InstructionDataModule) -> dict[str, Any]:
    """The manifest's entries on the base's settings, by which a fit sees that these have changed since.

    They are no part of `describe_inputs`, which a finished selection of an earlier release must agree with.
    """
    stored = stored_configuration(model_folder(module.model_name_or_path))
    return {"configuration": stored, "special_tokens": special_tokens(data.tokenizer)}


def working_directory() -> str | None:
    """The directory from which a run's relative paths lead to its inputs, if it is one that JSON can name."""
    try:
        directory = os.getcwd()
        directory.encode()
    except (OSError, UnicodeEncodeError):
        return None
    return directory


def _data(data: InstructionDataModule) -> DataSection:
    paths = validation_sources(data.validation)
    sets = {name: Source(**_source(paths[name], examples)) for name, examples in data.validation_sets.items()}
    return DataSection(
        train=TrainSource(**_source(data.train, data.train_examples), split=data.train_split),
        validation=sets if data.named_validation else sets["validation"],
        max_length=data.max_length,
        batch_tokens=data.batch_tokens,
        batch_size=data.batch_size,
        packing=data.packing,
        padding_share=data.padding_share(),
        format=data.options,
    )


def _source(given: Given | None, examples: Examples) -> dict[str, Any]:
    return {
        "path": given,
        "fingerprint": examples.records.fingerprint,
        "rows": len(examples.records),
        "supervised_tokens": int(sum(examples.num_tokens)),
        "status": dict(examples.counts()),
    }


def describe_outcome(model: nn.Module, data: InstructionDataModule, chosen: Chosen, outcome: Outcome) -> dict[str, Any]:
    """The results of a selection: counts, sum identity, predicted improvement, and versions of packages.

    The scores cover all of the model's weights but the frozen ones.
    """
    weights, identity = _count_weights(chosen.mask), outcome.identity
    worst = max(identity.values(), key=lambda of: of["relative_difference"], default=None)
    examples = ExampleCounts(
        selected=len(chosen.examples),
        scored=len(chosen.example_scores.scores),
        near_duplicates=len(chosen.duplicate_of),
        rows=len(data.train_examples.status),
    )
    return {
        "counts": {"examples": asdict(examples), "parameters": asdict(weights)},
        "sum_identity": {**worst, "sets": identity} if worst and data.named_validation else worst,
        "prediction": outcome.prediction,
        "path_walked": outcome.path,
        "rounds": chosen.rounds,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "coverage": weights.scored / sum(p.numel() for p in model.parameters()),
    }


def recounted(manifest: Mapping[str, Any], mask: Mapping[str, Tensor], **examples: int) -> dict[str, Any]:
    """The counts of a manifest after another choice of weights, and of examples with these counts."""
    before = manifest["counts"]
    return {
        **before,
        "examples": {**before["examples"], **examples},
        "parameters": {**before["parameters"], **asdict(_count_weights(mask))},
    }


def _count_weights(mask: Mapping[str, Tensor]) -> ParameterCounts:
    return ParameterCounts(
        selected=sum(int(part.count_nonzero()) for part in mask.values()),
        scored=sum(part.numel() for part in mask.values()),
    )
