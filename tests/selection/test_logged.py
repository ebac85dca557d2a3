"""A selection in figures, for loggers."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from dualsft.selection.logged import logged
from dualsft.selection.manifest import Manifest, open_manifest
from tests.world.jobs import MANIFEST


def about(folder: Path, change: dict[str, Any]) -> Manifest:
    """A tiny selection's manifest with other entries."""
    stored = {**json.loads(MANIFEST.read_text(encoding="utf-8")), **change}
    (folder / "manifest.json").write_text(json.dumps(stored), encoding="utf-8")
    return open_manifest(folder)[1]


def test_figures_are_those_of_the_manifest(tmp_path: Path) -> None:
    """Counts and checks are as they are there; phases of one name are together; what is null is left out."""
    stored = json.loads(MANIFEST.read_text(encoding="utf-8"))
    phase = {**deepcopy(stored["phases"][-1]), "name": "twice", "seconds": 2.0, "tokens": 30, "peak_memory_bytes": 5}
    other = {**phase, "seconds": 3.0, "tokens": 20, "peak_memory_bytes": 7}
    found = logged(about(tmp_path, {"phases": [phase, other]}))
    assert found["examples/selected"] == stored["counts"]["examples"]["selected"]
    assert found["weights/scored"] == stored["counts"]["parameters"]["scored"]
    assert found["prediction/step_size"] == pytest.approx(stored["prediction"]["step_size"])
    assert (found["twice/seconds"], found["twice/tokens_per_second"], found["twice/peak_memory_bytes"]) == (5, 10, 7)
    without = logged(about(tmp_path, {"prediction": None, "sum_identity": None}))
    assert not [name for name in without if name.startswith(("prediction", "sum_identity"))]
    assert all(isinstance(value, float) for value in [*found.values(), *without.values()])
