"""Selection folders, and their manifests: read whole, and chosen from anew."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from dualsft import load_selection
from dualsft.cli import run
from dualsft.data.records import read_records
from dualsft.data.selected import selected_ids
from dualsft.selection.summary import summary
from tests.fuzz.changes import changed, changed_bytes, changed_lines, changed_table, changed_tensors
from tests.fuzz.harness import Fuzzer
from tests.world.damage import forget_checksums
from tests.world.jobs import QUIET, write_inputs

SKETCHED = ["--model.data_allocator", "diverse", "--model.token_scores", "true"]


@cache
def _world() -> tuple[TemporaryDirectory[str], dict[str, bytes]]:
    """The folder of a job, and name of each file of its selection -> its bytes."""
    folder = TemporaryDirectory()
    place = Path(folder.name)
    inputs = write_inputs(place, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    sources = ["--data.train", inputs.train, "--data.validation", inputs.validation]
    model = ["--model.model_name_or_path", inputs.model, "--model.data_budget", "3"]
    run(["select", *model, *sources, *SKETCHED, *QUIET, "--output_dir", str(place / "selection")])
    files = {path.name: path.read_bytes() for path in (place / "selection").iterdir() if path.is_file()}
    return folder, files


Change = tuple[str, bytes | None, bool]
"""Name of a file, its new bytes, None if it is lost, and whether the manifest has checksums."""


def _read(change: Change, folder: Path) -> None:
    """Read every part of a selection as the Python API gives it, as fit does, and as allocate does."""
    world, files = _world()
    place = folder / "selection"
    place.mkdir()
    for name, data in {**files, change[0]: change[1]}.items():
        if data is not None:
            (place / name).write_bytes(data)
    if not change[2]:
        forget_checksums(place)
    selection = load_selection(place)
    selected_ids(place, read_records(str(Path(world.name) / "train.jsonl")))
    assert all(mask.dtype == torch.bool for mask in selection.mask().values())
    _ = selection.records, selection.token_scores, selection.sketches(), selection.parameter_scores()
    summary(selection)
    run(["allocate", str(place), "--model.data_budget", "0.5", "--output_dir", str(folder / "again")])


@st.composite
def _manifests(draw: DrawFn) -> Change:
    manifest: Any = draw(changed(json.loads(_world()[1]["manifest.json"]), most=2))
    return "manifest.json", json.dumps(manifest).encode(), True


def _changed_json(data: bytes) -> st.SearchStrategy[bytes]:
    return changed(json.loads(data), most=2).map(lambda value: json.dumps(value).encode())


_BY_STRUCTURE = {
    ".json": _changed_json,
    ".safetensors": changed_tensors,
    ".parquet": changed_table,
    ".jsonl": changed_lines,
}


@st.composite
def _folders(draw: DrawFn) -> Change:
    files = _world()[1]
    name = draw(st.sampled_from(sorted(files)))
    structured = _BY_STRUCTURE.get(Path(name).suffix, changed_bytes)(files[name])
    data = draw(st.one_of(structured, structured, changed_bytes(files[name]), st.none()))
    return name, data, name == "manifest.json" or draw(st.integers(0, 4)) == 0  # which find most changes by themselves


MANIFESTS = Fuzzer(_manifests(), _read, _world)
SELECTIONS = Fuzzer(_folders(), _read, _world)
