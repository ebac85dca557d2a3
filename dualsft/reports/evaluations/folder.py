"""What `validate` has written, as far as the page shows it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dualsft.errors import UserError
from dualsft.reports.sources import Source
from dualsft.storage.json_lines import json_lines

_PREDICTIONS = "predictions.jsonl"
_NEEDED = {"set", "example_id", "prompt", "generation", "correct"}


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        folder: Its directory.
        model: The model, as it was given.
        data: The validation sets, as they were given.
        metrics: Metric -> value.
    """

    folder: Path
    model: str
    data: Any
    metrics: dict[str, float]

    @property
    def name(self) -> str:
        """What people call the model: a fit's folder for its checkpoint, otherwise the end of the path or hub id."""
        path = Path(self.model)
        return path.parent.name if self.base is not None else "/".join(path.parts[-2:])

    @cached_property
    def base(self) -> str | None:
        """The model that this one was trained from, if `fit` wrote it."""
        model = _settings(Path(self.model).parent / "config.yaml").get("model")
        base = model.get("model_name_or_path") if isinstance(model, dict) else None
        return str(base) if base else None

    @cached_property
    def predictions(self) -> dict[tuple[Any, Any], dict[str, Any]]:
        """(Set, example) -> the answer, as it was written; empty where none were generated or kept."""
        return {(of["set"], of["example_id"]): of for of in _lines(self.folder / _PREDICTIONS)}


def read_evaluation(source: Source) -> Evaluation:
    """Read an evaluation's folder; refuses one without its settings."""
    path = source.folder / "config.yaml"
    settings = _settings(path)
    model, data = settings.get("model"), settings.get("data")
    if not isinstance(model, dict) or not isinstance(data, dict):
        raise UserError(f"{path} is not that of an evaluation; name a directory that validate wrote.")
    metrics: dict[str, float] = json.loads((source.folder / "metrics.json").read_text(encoding="utf-8"))
    return Evaluation(source.folder, str(model.get("model_name_or_path")), data.get("validation"), metrics)


def _settings(path: Path) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in json_lines(path):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}); evaluate again.") from error
        if not isinstance(found, dict) or not found.keys() >= _NEEDED:
            raise UserError(f"{path} is damaged: a line lacks {', '.join(sorted(_NEEDED))}; evaluate again.")
        yield found
