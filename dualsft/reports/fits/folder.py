"""What `fit` has written, as far as the page shows it."""

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dualsft.errors import UserError
from dualsft.finetune.samples import FILE
from dualsft.reports.sources import Source
from dualsft.selection.json_values import Mismatch, typed
from dualsft.storage.json_lines import json_lines

TRAINED = "train_loss"
"""The column that each training row of the log has."""


@dataclass(frozen=True)
class Weights:
    """How many weights were trained, of how many."""

    trained: int
    all: int


@dataclass(frozen=True)
class Examples:
    """How many examples an epoch had, and were passed in all."""

    each_epoch: int
    passed: int


@dataclass(frozen=True)
class Validation:
    """The metrics of the base model, and those at the step of the last validation; null where none was made."""

    base: dict[str, float] | None
    step: int | None
    metrics: dict[str, float] | None


@dataclass(frozen=True)
class FitFigures:
    """``metrics.json``; see `dualsft.finetune.fit_report.FitReport`."""

    weights: Weights
    examples: Examples
    epochs: int
    steps: int
    exported_step: int
    validation: Validation
    tokens: int
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Fit:
    """A finished fit.

    Attributes:
        name: What the page calls it.
        figures: The figures of its end.
        settings: Its configuration.
        log: The rows of ``metrics.csv``: column -> value, of those that have one.
        samples: The answers that it logged, in the order of the steps.
    """

    name: str
    figures: FitFigures
    settings: dict[str, Any]
    log: list[dict[str, float]]
    samples: list[dict[str, Any]]

    def losses(self, column: str) -> tuple[list[float], list[float]]:
        """The steps after which a column of the log has a finite value, and the values; of the base model that is 0.

        A training row has the number of its batch, from 0, and a validation's the steps that were taken before it.
        """
        rows = [(row["step"] + (TRAINED in row), row[column]) for row in self.log if column in row and "step" in row]
        steps, values = zip(*rows, strict=True) if rows else ((), ())
        return list(steps), list(values)


def read_fit(source: Source) -> Fit:
    """Read a fit's folder.

    Raises:
        UserError: if its figures are missing or damaged.
    """
    logs = source.folder / "logs"
    tables = sorted(logs.glob("*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    return Fit(
        source.name,
        _figures(source.folder / "metrics.json"),
        _settings(source.folder / "config.yaml"),
        list(_rows(tables[-1])) if tables else [],
        list(_samples(logs / FILE)),
    )


def _figures(path: Path) -> FitFigures:
    try:
        found = typed(FitFigures, json.loads(path.read_text(encoding="utf-8")), "")
    except (Mismatch, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not that of a finished fit ({error}); name a directory that fit wrote.") from error
    assert isinstance(found, FitFigures)
    return found


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _rows(path: Path) -> Iterator[dict[str, float]]:
    with open(path, encoding="utf-8", errors="replace", newline="") as stream:
        for row in csv.DictReader(stream):
            yield {name: number for name, text in row.items() if name and (number := _number(text)) is not None}


def _number(text: Any) -> float | None:
    try:
        number = float(text)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    """The samples that are whole: a kill may have cut the last."""
    for line in json_lines(path):
        try:
            sample = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(sample, dict) and {"step", "set", "example_id", "prompt", "answer", "reference"} <= sample.keys():
            yield sample
