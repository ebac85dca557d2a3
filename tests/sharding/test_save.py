"""A sharded model's files are those of the same model in one piece, to the byte."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import modeling_utils

from dualsft.errors import UserError
from dualsft.export.checkpoints import save_weights
from dualsft.export.whole import whole_of
from dualsft.models.loading import load_model
from dualsft.sharding import files
from dualsft.sharding import save as saving
from dualsft.sharding.files import write_full_tensors
from dualsft.sharding.groups import shard_mesh
from dualsft.sharding.load import load_sharded
from dualsft.sharding.save import write_shards
from dualsft.sharding.shards import local_shard
from tests.cases import ARCHITECTURES, make
from tests.world.models import save_tiny_model
from tests.world.multimodal import save_whole
from tests.world.ranks import run_on_ranks

pytestmark = pytest.mark.heavy

split: Any = modeling_utils.split_torch_state_dict_into_shards


def small_files() -> Any:
    """Models are saved in files of 20 KB."""

    def divide(state: Any, **options: Any) -> Any:
        return split(state, **{**options, "max_shard_size": "20KB"})

    return mock.patch.object(modeling_utils, "split_torch_state_dict_into_shards", divide)


def save_all(folders: dict[str, str], target: Path) -> None:
    """Load each model in shards and save it, the last in small files too; each weight is made whole once."""
    for name, folder in folders.items():
        model = load_sharded(folder, shard_mesh("cpu"))
        with mock.patch.object(files, "full_tensor", wraps=files.full_tensor) as gathered:
            save_weights(model, target / name)
        assert gathered.call_count == len([*model.parameters()]), name
    with small_files():
        save_weights(model, target / "small files")
    with mock.patch.object(saving, "_MIN_FILE", 1):
        save_weights(model, target / "divided")


def assert_same_files(found: Path, expected: Path) -> None:
    """Two folders hold files of the same names and bytes."""
    names = [path.name for path in sorted(expected.iterdir())]
    assert [path.name for path in sorted(found.iterdir())] == names
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), f"{found.name}/{name}"


def check(folders: dict[str, str], root: Path, count: int) -> None:
    """Save on ranks and in one piece, and compare."""
    run_on_ranks(count, save_all, folders, root / "found")
    for name, folder in folders.items():
        model = load_model(folder)
        save_weights(model, root / "expected" / name)
        assert_same_files(root / "found" / name, root / "expected" / name)
    with small_files():
        save_weights(model, root / "expected" / "small files")
    assert len([*(root / "expected" / "small files").glob("*.safetensors")]) > 1
    assert_same_files(root / "found" / "small files", root / "expected" / "small files")
    assert len([*(root / "found" / "divided").glob("*.safetensors")]) >= count
    divided, whole = load_model(str(root / "found" / "divided")).state_dict(), model.state_dict()
    assert all(torch.equal(divided[name], value) for name, value in whole.items())


@pytest.mark.parametrize("count", [1, 3])
def test_files_are_those_of_one_process(tmp_path: Path, count: int) -> None:
    """Of a tied Llama in bfloat16 and of an untied one, in one file and in several."""
    made = {
        "tied": save_tiny_model(tmp_path / "tied", dtype=torch.bfloat16),
        "untied": save_tiny_model(tmp_path / "untied", tied=False),
    }
    check(made, tmp_path, count)


def test_files_of_every_architecture(tmp_path: Path) -> None:
    """Experts are written apart that the model holds as stacks, and whatever else the library undoes."""
    folders = {name: str(tmp_path / name) for name in ARCHITECTURES}
    for name, path in folders.items():
        make(name, torch.float32).save_pretrained(path)
    check(folders, tmp_path, 2)


def refusals(folder: Path) -> list[str]:
    """What both ways to write sharded tensors say of a folder that one rank cannot write to."""
    like = {name: distribute_tensor(torch.ones(4, 2), shard_mesh("cpu"), [Shard(0)]) for name in "ab"}
    shards = {name: local_shard(tensor) for name, tensor in like.items()}
    told = []
    for write in (partial(write_full_tensors, folder=folder, stem="x"), partial(write_shards, path=folder / "y")):
        with pytest.raises(UserError) as caught:
            write(shards, like)
        told.append(str(caught.value))
    return told


def test_a_folder_that_cannot_be_written_is_refused_on_every_rank(tmp_path: Path) -> None:
    """In one sentence, and no rank waits for another."""
    missing = tmp_path / "missing"
    advice = "its folder is gone: leave an output folder alone while a run is at work, and run again."
    sentence = f"{missing} cannot be written (No such file or directory); {advice}"
    assert run_on_ranks(2, refusals, missing) == [[sentence] * 2] * 2


def save_as_a_whole(base: str, target: Path) -> None:
    """Load the language model of a base in shards, and save it with the rest of the base."""
    save_weights(load_sharded(base, shard_mesh("cpu")), target, whole_of(base))


@pytest.mark.parametrize("file_size", ["1GB", "20KB"])
def test_a_base_that_is_more_than_its_language_model_is_saved_whole(tmp_path: Path, file_size: str) -> None:
    """Two ranks write the files that a single process does, which hold the tensors of the base."""
    base = save_whole(tmp_path / "base", "qwen3_5 tied", file_size)
    save_weights(load_model(base), tmp_path / "alone", whole_of(base))
    run_on_ranks(2, save_as_a_whole, base, tmp_path / "sharded")
    assert_same_files(tmp_path / "sharded", tmp_path / "alone")
    for path in (tmp_path / "base").glob("*.safetensors"):
        before, after = load_file(path), load_file(tmp_path / "sharded" / path.name)
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
