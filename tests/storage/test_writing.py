"""Writing whole files."""

import errno
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dualsft.errors import UserError
from dualsft.storage.writing import refusal, replacing, sync_tree, write_atomically, writing_to
from tests.world.damage import full_disk


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    """What fails leaves the old file and nothing beside it; what succeeds leaves the new one alone."""
    path = tmp_path / "f"
    write_atomically(path, "old")

    def broken() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("f", "old")]
    write_atomically(path, "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("f", "new")]
    sync_tree(tmp_path)


@pytest.mark.parametrize("library", ["python", "torch", "safetensors", "pyarrow"])
def test_what_libraries_raise_on_a_full_disk_becomes_a_sentence(tmp_path: Path, library: str) -> None:
    """Each library has an exception of its own for it."""
    path, many = tmp_path / "f", torch.randn(20_000)

    def write() -> None:
        if library == "python":
            write_atomically(path, "x" * 20_000)
        elif library == "torch":
            with open(path, "wb") as stream:
                torch.save(many, stream)
        elif library == "safetensors":
            save_file({"w": many}, path)
        else:
            pq.write_table(pa.table({"x": many.numpy()}), path)

    def on_a_full_disk() -> None:
        with full_disk(1_000), writing_to(tmp_path):
            write()

    with pytest.raises(UserError, match=r".* cannot be written \(File too large\); see that it has room\."):
        on_a_full_disk()


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    """A bug keeps its traceback, and a sentence its words."""
    for error in (ValueError("x"), OSError("no number"), SafetensorError("a header is wrong")):
        assert refusal(error) is None
        with pytest.raises(type(error)), writing_to(tmp_path):
            raise error
    with pytest.raises(UserError, match=r"^as it is$"), writing_to(tmp_path):
        raise UserError("as it is") from OSError(errno.ENOSPC, "x")
