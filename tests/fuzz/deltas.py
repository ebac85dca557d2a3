"""Deltas: their header, their tensors and their bytes changed; applied to the base model that they were made from."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from dualsft.cli import run
from dualsft.export.delta import Changes, write_delta
from dualsft.models.loading import model_fingerprint
from tests.fuzz.changes import changed, changed_bytes, changed_tensors, with_header
from tests.fuzz.harness import Fuzzer
from tests.world.models import save_tiny_model


@cache
def _world() -> tuple[TemporaryDirectory[str], str, bytes]:
    """The folder of a base model, its path, and the bytes of a delta of it."""
    folder = TemporaryDirectory()
    base = save_tiny_model(Path(folder.name) / "base", hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    change = (torch.tensor([0, 5, 7]), torch.tensor([1.0, 2.0, 3.0]))
    names = ("model.norm.weight", "model.embed_tokens.weight")
    about = {"base": {"name_or_path": base}, "counts": {}, "training": {"epochs": 1}}
    changes = Changes(dict.fromkeys(names, 3), dict.fromkeys(names, torch.float32), lambda _: change)
    write_delta(Path(folder.name) / "delta.safetensors", changes, model_fingerprint(base), about)
    return folder, base, (Path(folder.name) / "delta.safetensors").read_bytes()


def _without_checksum(data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    del header["__metadata__"]["crc32"]
    return with_header(header, data[8 + size :])


@st.composite
def _cases(draw: DrawFn) -> bytes:
    data = _world()[2]
    if draw(st.integers(0, 4)):  # as an earlier version wrote it: the checksum finds most changes by itself
        data = _without_checksum(data)
    how = draw(st.sampled_from(["bytes", "header", "about", "about"]))
    if how != "about":
        return draw(changed_bytes(data) if how == "bytes" else changed_tensors(data))
    size = int.from_bytes(data[:8], "little")
    header: Any = json.loads(data[8 : 8 + size])
    about = json.loads(header["__metadata__"]["about"])
    header["__metadata__"]["about"] = json.dumps(draw(changed(about)))
    return with_header(header, data[8 + size :])


def _apply(data: bytes, folder: Path) -> None:
    path = folder / "delta.safetensors"
    path.write_bytes(data)
    run(["export", "apply", "--base", _world()[1], "--delta", str(path), "--output_dir", str(folder / "model")])


DELTAS = Fuzzer(_cases(), _apply, _world)
