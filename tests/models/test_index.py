"""The index of a checkpoint in several files."""

import json
from pathlib import Path
from typing import Any

import pytest

from dualsft.errors import UserError
from dualsft.models.index import read_index

MAP = {"a": "one.safetensors", "b": "parts/two.safetensors"}


def write(folder: Path, index: Any) -> Path:
    """An index beside its files."""
    (folder / "parts").mkdir(exist_ok=True)
    for name in MAP.values():
        (folder / name).touch()
    path = folder / "model.safetensors.index.json"
    path.write_text(index if isinstance(index, str) else json.dumps(index), encoding="utf-8")
    return path


def test_an_index_names_the_file_of_each_tensor(tmp_path: Path) -> None:
    """In folders too, with or without metadata."""
    assert read_index(write(tmp_path, {"weight_map": MAP})) == MAP
    assert read_index(write(tmp_path, {"metadata": {"total_size": 1}, "weight_map": MAP})) == MAP


@pytest.mark.parametrize(
    "index",
    [
        *("", "{", "\0\0", "[" * 100_000, [1], {}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}}),
        *({"weight_map": {"a": 1}}, {"weight_map": {"a": None}}, {"weight_map": MAP, "metadata": [1]}),
        *({"weight_map": {"a": "gone.safetensors"}}, {"weight_map": {"a": "/etc/passwd"}}, {"weight_map": {"a": ""}}),
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, index: Any) -> None:
    """Cut, empty, of other types, or of files that are not there."""
    path = write(tmp_path, index)
    with pytest.raises(UserError, match=r"index\.json (is damaged|names) .*; copy the checkpoint again") as refused:
        read_index(path)
    assert len(str(refused.value)) < 1_000
