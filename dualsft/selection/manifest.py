"""``manifest.json`` as dataclasses: the inputs, settings, results and costs of a selection.

The file is written from these sections (`describe.py`) and read by them. The options of `dualsft select` have their
places in it by `SelectionSettings`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualsft.data.options import FormatOptions
from dualsft.data.selected import read_manifest
from dualsft.data.sources import sources_of
from dualsft.errors import UserError
from dualsft.models.loading import Dtype
from dualsft.selection.json_values import Mismatch, typed
from dualsft.selection.paths.completeness import Completeness
from dualsft.selection.settings import add_later_options, keys, stored_settings

PUBLISHED = (
    *(*keys("direction"), *keys("step"), *keys("objective"), *keys("parameters", "data")),
    *("counts", "coverage", "control", "seed"),
)
"""The keys that a model trained on the selection is published with."""


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
    directory: str | None = None  # the working directory, which relative paths start from; absent before it was kept
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
