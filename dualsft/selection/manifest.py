"""``manifest.json``: the inputs, settings, results and costs of a selection.

The sections are dataclasses, from which the file is written and by which it is read. The options of `dualsft select`
have their places in it by `SelectionSettings`.
"""

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from dualsft.data.examples import Examples
from dualsft.data.module import InstructionDataModule
from dualsft.data.options import FormatOptions, validation_sources
from dualsft.data.selected import read_manifest
from dualsft.data.sources import Given, sources_of
from dualsft.errors import UserError
from dualsft.matrix.passes import compute_dtype
from dualsft.models.configuration import stored_configuration
from dualsft.models.loading import Dtype, model_fingerprint, model_folder, special_tokens, tokenizer_fingerprint
from dualsft.selection.json_values import Mismatch, typed
from dualsft.selection.order import Chosen, ScoresBothSides
from dualsft.selection.paths.completeness import Completeness
from dualsft.selection.scoring_checkpoint import describe_checkpoint
from dualsft.selection.settings import add_later_options, describe_settings, keys, stored_settings

if TYPE_CHECKING:
    from dualsft.selection.module import SelectionModule

PUBLISHED = (
    *(*keys("direction"), *keys("step"), *keys("objective"), *keys("parameters", "data")),
    *("counts", "coverage", "control", "seed"),
)
"""The keys that a model trained on the selection is published with."""
_PACKAGES = ("dualsft", "torch", "transformers", "lightning", "datasets", "tokenizers", "safetensors")


@dataclass(frozen=True)
class ModelSection:
    """The base model, the type of its weights, and the type of computations with them."""

    name_or_path: str
    fingerprint: str
    num_parameters: int
    dtype: Dtype
    compute_dtype: str


@dataclass(frozen=True)
class Source:
    """A set of records: the sources as they were given, its fingerprint, and how many examples have which status."""

    path: str | list[Any] | dict[str, Any]
    fingerprint: str
    rows: int
    supervised_tokens: int
    status: dict[str, int]


@dataclass(frozen=True)
class TrainSource(Source):
    """The records that examples are chosen from."""

    split: str


@dataclass(frozen=True)
class DataSection:
    """The records and how they are read and batched; several validation sets are listed by name."""

    train: TrainSource
    validation: Source | dict[str, Source]
    max_length: int
    batch_tokens: int
    batch_size: int | None
    packing: bool
    padding_share: float
    format: FormatOptions


@dataclass(frozen=True, kw_only=True)
class ExampleCounts:
    """How many examples there are, by what became of them."""

    selected: int
    scored: int
    near_duplicates: int = 0  # absent before there was the option
    rows: int


@dataclass(frozen=True)
class ParameterCounts:
    """How many weights have scores, and how many of them are chosen."""

    selected: int
    scored: int


@dataclass(frozen=True)
class Counts:
    """Both sides' counts."""

    examples: ExampleCounts
    parameters: ParameterCounts


@dataclass(frozen=True)
class SumIdentity:
    """Both sides of Σ_i φ_i = Σ_j φ_j, for the validation set where they differ most.

    Null where no weight was scored.
    """

    row_sum: float
    column_sum: float
    relative_difference: float
    tolerance: float


@dataclass(frozen=True)
class Prediction:
    """The quadratic's prediction along the pool step: <v, d>, dᵀHd, and the improvement at the step size."""

    step_size: float
    slope: float
    curvature: float | None
    predicted_improvement: float
    second_order_share: float | None


@dataclass(frozen=True)
class WalkedPath:
    """A path: the steps at its points, how many were walked, and how near the scores are to the falls of the losses.

    Each is null where nothing was integrated, as the examples' scores are the falls themselves then.
    """

    steps: list[int]
    walked_steps: int
    held_out_losses: list[float] | None = None
    pool: Completeness | None = None
    validation: Completeness | None = None


@dataclass(frozen=True)
class RoundSide:
    """One side's choice in a round, and the share of it that the round before had chosen too."""

    selected: int
    overlap: float | None


@dataclass(frozen=True)
class Round:
    """One round of an order in which the sides are re-scored by each other."""

    round: int
    parameters: RoundSide
    data: RoundSide


@dataclass(frozen=True)
class PhaseCost:
    """The work of a phase, and its cost."""

    name: str
    examples: int
    tokens: int
    seconds: float
    peak_memory_bytes: int
    tokens_per_second: float


@dataclass(frozen=True)
class Manifest:
    """A manifest with types; ``settings`` has the options by name, wherever the file has them, and parts as `Part`."""

    settings: dict[str, Any]
    model: ModelSection
    scoring_checkpoint: dict[str, str | None] | None
    tokenizer: dict[str, str]
    data: DataSection
    seed: int
    counts: Counts
    sum_identity: SumIdentity | None
    prediction: Prediction | None
    rounds: list[Round]
    versions: dict[str, str]
    coverage: float
    scoring_batch_tokens: int
    phases: list[PhaseCost]
    path_walked: dict[str, WalkedPath] | None = None  # absent before there were paths
    configuration: dict[str, Any] | None = None  # absent before it was kept
    special_tokens: dict[str, str] | None = None  # absent before they were kept
    checksums: dict[str, str] | None = None  # name of each other file -> CRC-32; absent before they were taken


def open_manifest(folder: Path) -> tuple[dict[str, Any], Manifest]:
    """The manifest of a selection: as plain JSON, including keys that other programs have added, and as `Manifest`.

    An option that is newer than the selection has its default.

    Raises:
        UserError: if there is none, another version wrote it, or a key is missing or of a wrong type.
    """
    stored = read_manifest(folder)
    try:
        add_later_options(stored)
        about = typed(Manifest, {**stored, "settings": stored_settings(stored)}, "")
        _check_sources(about.data)
        return stored, about
    except (Mismatch, UserError) as error:
        raise UserError(f"{folder / 'manifest.json'}: {str(error).rstrip('.')}; make the selection again.") from error


def _check_sources(data: DataSection) -> None:
    """Refuse what no option could have given as the sources of a set."""
    sets = data.validation if isinstance(data.validation, dict) else {"": data.validation}
    for key, source in {
        "train": data.train,
        **{f"validation.{name}".rstrip("."): of for name, of in sets.items()},
    }.items():
        sources_of(source.path, f"data.{key}.path")


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
    return {**{key: value for key, value in inputs.items() if key not in free}, **measured}


def describe_configuration(module: "SelectionModule", data: InstructionDataModule) -> dict[str, Any]:
    """The manifest's entries on the base's settings, by which a fit sees that these have changed since.

    They are no part of `describe_inputs`, which a finished selection of an earlier release must agree with.
    """
    stored = stored_configuration(model_folder(module.model_name_or_path))
    return {"configuration": stored, "special_tokens": special_tokens(data.tokenizer)}


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


def describe_outcome(
    model: nn.Module, data: InstructionDataModule, chosen: Chosen, scoring: ScoresBothSides
) -> dict[str, Any]:
    """The results of a selection: counts, sum identity, predicted improvement, and versions of packages.

    The scores cover all of the model's weights but the frozen ones.
    """
    weights, identity = _count_weights(chosen.mask), scoring.identity
    worst = max(identity.values(), key=lambda of: of["relative_difference"], default=None)
    examples = ExampleCounts(
        selected=len(chosen.examples),
        scored=len(chosen.example_scores.scores),
        near_duplicates=chosen.collapsed,
        rows=len(data.train_examples.status),
    )
    return {
        "counts": {"examples": asdict(examples), "parameters": asdict(weights)},
        "sum_identity": {**worst, "sets": identity} if worst and data.named_validation else worst,
        "prediction": scoring.prediction(),
        "path_walked": scoring.describe(),
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
        selected=sum(int(part.sum()) for part in mask.values()), scored=sum(part.numel() for part in mask.values())
    )
