import pytest
import torch

from dualsft.selection.mask import pack_bits, unpack_bits


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
