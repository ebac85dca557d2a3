from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualsft.models.tensor_file import DTYPES, OpenTensors, TensorSpec, check_tensors, write_tensors
from tests.world.damage import flipped


def test_a_file_is_what_safetensors_itself_writes(tmp_path: Path) -> None:
    """Every type, no entries, no axes and odd lengths: the bytes are those of the library, and it reads them back."""
    tensors = {f"t{k}": torch.arange(6).view(2, 3).to(dtype) for k, dtype in enumerate(DTYPES.values())}
    tensors |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "é": torch.ones(1, dtype=torch.uint8)}
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "ours", specs, tensors.__getitem__, {"format": "pt"})
    found = load_file(tmp_path / "ours")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())
    plain = {name: tensor for name, tensor in tensors.items() if tensor.dtype in (torch.float32, torch.bfloat16)}
    write_tensors(tmp_path / "plain", {name: specs[name] for name in plain}, plain.__getitem__, {"format": "pt"})
    save_file(plain, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_tensor_is_what_was_announced(tmp_path: Path) -> None:
    """Another shape would shift all that follows."""
    with pytest.raises(ValueError, match="announced"):
        write_tensors(tmp_path / "x", {"a": TensorSpec(torch.float32, (3,))}, lambda _: torch.zeros(2), {})


def test_a_flipped_bit_is_noticed_by_the_checksum(tmp_path: Path) -> None:
    """Anywhere in the file, unless the library or the missing checksum tells; the same bytes on every run."""
    tensors = {"a": torch.arange(5.0), "empty": torch.zeros(0), 'odd "crc32":"00000000"': torch.ones(2, 2)}
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    metadata = {"about": '{"crc32":"00000000"}', "zeros": "00000000"}
    for name in ("x", "again"):
        write_tensors(tmp_path / name, specs, tensors.__getitem__, metadata, checksum=True)
        check_tensors(tmp_path / name)
    whole = (tmp_path / "x").read_bytes()
    assert whole == (tmp_path / "again").read_bytes()
    assert all(torch.equal(tensors[name], found) for name, found in load_file(tmp_path / "x").items())
    key = whole.index(b'"crc32":"')
    for place in {*range(8, len(whole))} - {*range(key, key + 9), key + 17}:
        (tmp_path / "x").write_bytes(flipped(whole, place))
        with pytest.raises(ValueError, match="other bytes than were written"):
            check_tensors(tmp_path / "x")
    write_tensors(tmp_path / "plain", specs, tensors.__getitem__, metadata)
    check_tensors(tmp_path / "plain")


def test_a_tensor_is_read_at_every_use(tmp_path: Path) -> None:
    """Of every type, as the library wrote it, into memory of its own, even after the file has been replaced."""
    tensors = {f"t{k}": torch.arange(6).view(2, 3).to(dtype) for k, dtype in enumerate(DTYPES.values())}
    tensors |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    save_file(tensors, path := tmp_path / "x", {"about": "a test"})
    found = OpenTensors(path)
    path.unlink()
    path.write_bytes(b"another")
    assert (set(found), found.metadata) == (set(tensors), {"about": "a test"})
    assert found.specs == {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    found["t1"].zero_()
    for name, tensor in tensors.items():
        assert TensorSpec.of(found[name]) == found.specs[name]
        assert torch.equal(found[name].float(), tensor.float())


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """Not a tensor of what happened to be in memory."""
    save_file({"a": torch.ones(100)}, path := tmp_path / "x")
    found = OpenTensors(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="ends before a does"):
        found["a"]
