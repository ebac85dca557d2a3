from itertools import product

import pytest
import torch

from dualsft.allocators.structured import Tiling
from tests.allocators.cases import random_scores

SHAPES = [(), (1,), (7,), (4, 6), (5, 3), (1, 4), (2, 3, 5), (2, 2, 3, 2), (3, 0), (0, 3), (0,), (0, 2, 2)]
TILES = [(1, None), (None, 1), (1, 1), (2, 2), (3, 3), (64, 64), (None, None)]


def loops(shape: tuple[int, ...], height: int | None, width: int | None) -> list[list[int]]:
    """The flat indices of each tile: matrix after matrix, rows of tiles from above, tiles from the left."""
    *batch, rows, columns = shape if len(shape) > 1 else (*shape, 1) if shape else (1, 1)
    tiles: dict[tuple[int, int, int], list[int]] = {}
    places = product(range(torch.Size(batch).numel()), range(rows), range(columns))
    for flat, (matrix, row, column) in enumerate(places):
        key = (matrix, row // (height or max(1, rows)), column // (width or max(1, columns)))
        tiles.setdefault(key, []).append(flat)
    return [tiles[key] for key in sorted(tiles)]


@pytest.mark.parametrize(("height", "width"), TILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_are_those_of_loops(shape: tuple[int, ...], height: int | None, width: int | None) -> None:
    """Number, sizes, sums, places and masks of the tiles are those that loops over rows and columns find."""
    tiling, tiles = Tiling.of(shape, height, width), loops(shape, height, width)
    values = random_scores(0, {"w": shape})["w"]
    flat = values.flatten().double()
    assert tiling.count == len(tiles)
    assert tiling.sizes().tolist() == [len(tile) for tile in tiles]
    torch.testing.assert_close(tiling.sums(values), torch.tensor([float(flat[t].sum()) for t in tiles]).double())
    index = torch.arange(values.numel()).view(tiling.shape)
    assert [index[tiling.slices(k)].flatten().tolist() for k in range(len(tiles))] == tiles
    for k, tile in enumerate(tiles):
        chosen = tiling.entries(torch.arange(len(tiles)) == k)
        assert chosen.nonzero().flatten().tolist() == tile
        assert len(chosen) == values.numel()


def test_sums_are_in_float64() -> None:
    """What float32 would round away is in the sum."""
    assert Tiling.of((1, 3), 1, None).sums(torch.tensor([[2.0**24, 1.0, 1.0]])).tolist() == [2.0**24 + 2]


def test_transposed_tensors_are_cut_as_they_look() -> None:
    """What lies in memory otherwise has the same tiles."""
    values = torch.arange(6.0).view(2, 3)
    assert Tiling.of((3, 2), 1, None).sums(values.T).tolist() == [3.0, 5.0, 7.0]
