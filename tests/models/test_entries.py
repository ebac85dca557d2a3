import pytest
import torch

from dualsft.models.entries import set_entries


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("transposed", [False, True])
def test_entries_are_set_in_row_major_order(dtype: torch.dtype, transposed: bool) -> None:
    """Whatever the index's type and the tensor's strides, the result is that of one assignment after another."""
    tensor = torch.arange(12.0).view(4, 3).t() if transposed else torch.arange(12.0).view(3, 4)
    index, values = torch.tensor([1, 4, 11], dtype=dtype), torch.tensor([-1.0, -2.0, -3.0])
    expected = tensor.tolist()
    for place, value in zip(index.tolist(), values.tolist(), strict=True):
        expected[place // 4][place % 4] = value
    set_entries(tensor, index, values)
    assert tensor.tolist() == expected
