import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dualsft.errors import UserError
from dualsft.selection.mask import pack_bits, stored_masks, unpack_bits


def test_bits_are_little_endian() -> None:
    """Entry j is bit j % 8 of byte j // 8; the last byte is filled up with zeros."""
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 0] = mask[1, 3] = mask[2, 1] = True  # flat 0, 7 and 9
    assert pack_bits(mask).tolist() == [1 + 128, 2]


@pytest.mark.parametrize("shape", [(1,), (8,), (9,), (3, 5, 7), (), (0, 4)])
def test_packing_is_undone(shape: tuple[int, ...]) -> None:
    """Any shape comes back, in an eighth of the bytes."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-mask.numel() // 8)
    assert torch.equal(unpack_bits(packed, shape), mask)


def test_a_mask_may_be_any_view() -> None:
    """The flat order is that of the parameter as it is indexed, not as it lies in memory."""
    mask = (torch.arange(6).view(2, 3) % 2 == 0).t()
    assert torch.equal(unpack_bits(pack_bits(mask), (3, 2)), mask)


MASKS = {"b": torch.tensor([[True, False], [False, True]]), "a": torch.ones(9, dtype=torch.bool)}


def store(path: Path, shapes: dict[str, list[int]]) -> Path:
    """A file of masks, which says that they have these shapes."""
    save_file({name: pack_bits(mask) for name, mask in MASKS.items()}, path, {"shapes": json.dumps(shapes)})
    return path


def test_stored_masks_are_unpacked_when_asked_for(tmp_path: Path) -> None:
    """A mapping in the order of names, which looks at no mask to say which there are."""
    stored = stored_masks(store(tmp_path / "mask.safetensors", {n: list(m.shape) for n, m in MASKS.items()}))
    assert list(stored) == ["a", "b"]
    assert ("a" in stored, "c" in stored, len(stored)) == (True, False, 2)
    assert all(torch.equal(stored[name], mask) for name, mask in MASKS.items())


@pytest.mark.parametrize("shapes", [{"a": [9], "c": [2, 2]}, {"a": [9], "b": [40, 40]}])
def test_a_damaged_file_is_named(tmp_path: Path, shapes: dict[str, list[int]]) -> None:
    """A mask that is not there, or has another size than it should."""
    path = store(tmp_path / "mask.safetensors", shapes)
    with pytest.raises(UserError, match=r"mask\.safetensors is damaged .*; make the selection again"):
        dict(stored_masks(path))


def test_what_is_no_file_of_masks_is_named(tmp_path: Path) -> None:
    """Anything else by that name."""
    path = tmp_path / "mask.safetensors"
    path.write_bytes(b"not this")
    with pytest.raises(UserError, match="is damaged"):
        stored_masks(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="is damaged"):
        stored_masks(path)
