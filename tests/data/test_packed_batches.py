import numpy as np
import pytest

from dualsft.data import TrainingBatches, length_batches, packed_batches, padding_share
from dualsft.data.packed_batches import few_packed_batches
from dualsft.errors import UserError

LIMITS = [(64, 64), (200, 64), (1000, 200)]
"""Tokens of a batch, and of a row."""


def some_lengths(seed: int, count: int = 333) -> np.ndarray:
    """Lengths from 1 to 64."""
    return np.random.default_rng(seed).integers(1, 65, size=count)


def ids(batches: list[list[list[int]]]) -> list[int]:
    """The ids in all batches, ascending."""
    return sorted(example for batch in batches for row in batch for example in row)


def assert_within(
    batches: list[list[list[int]]], lengths: np.ndarray, batch_tokens: int, row_tokens: int, batch_size: int | None
) -> None:
    """No row is wider than a row may be, no batch costs more than a batch may, or has more examples."""
    for batch in batches:
        widths = [int(lengths[row].sum()) for row in batch]
        assert max(widths) <= row_tokens
        assert len(batch) * max(widths) <= batch_tokens
        assert batch_size is None or sum(map(len, batch)) <= batch_size


@pytest.mark.parametrize("batch_size", [None, 1, 5])
@pytest.mark.parametrize(("batch_tokens", "row_tokens"), LIMITS)
def test_batches_keep_their_promises(batch_tokens: int, row_tokens: int, batch_size: int | None) -> None:
    """Each example occurs once, the fullest rows come first, and no batch exceeds a limit; the same every time."""
    lengths = some_lengths(0)
    batches = packed_batches(lengths, batch_tokens, row_tokens, batch_size)
    assert ids(batches) == list(range(333))
    assert_within(batches, lengths, batch_tokens, row_tokens, batch_size)
    widths = [int(lengths[row].sum()) for batch in batches for row in batch]
    assert widths == sorted(widths, reverse=True)
    some = packed_batches(lengths.tolist(), batch_tokens, row_tokens, batch_size, [300, 4, 17])
    assert some == packed_batches(lengths, batch_tokens, row_tokens, batch_size, [4, 17, 300])
    assert ids(some) == [4, 17, 300]


def test_a_row_is_no_larger_than_a_batch() -> None:
    """A budget below the length of a row shortens the rows; an example beyond it is refused by name."""
    lengths = some_lengths(0)
    assert packed_batches(lengths, 100, 10_000) == packed_batches(lengths, 100, 100)
    with pytest.raises(UserError, match=r"Example 1 has 9 tokens, more than fit into a row of 8: raise data\.batch_t"):
        packed_batches([3, 9], 8, 64)
    with pytest.raises(UserError, match=r"Example 1 has 9 tokens"):
        TrainingBatches([3, 9], [0, 1], 8, 4, row_tokens=64)
    assert packed_batches([3, 9], 8, 64, ids=[]) == []


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize(("batch_tokens", "row_tokens"), LIMITS)
def test_training_batches_keep_their_promises(batch_tokens: int, row_tokens: int, batch_size: int) -> None:
    """Every epoch has the same batches in another order, each example once, within all limits; the seed decides."""
    lengths = some_lengths(1)
    chosen = list(range(0, 333, 2))
    sampler = TrainingBatches(lengths, chosen, batch_tokens, batch_size, 3, row_tokens)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    for batches in epochs:
        assert sorted(batches) == sorted(epochs[0])
        assert ids(batches) == chosen
        assert_within(batches, lengths, batch_tokens, row_tokens, batch_size)
        assert len(batches) == len(sampler)
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(TrainingBatches(lengths, chosen, batch_tokens, batch_size, 3, row_tokens)) == epochs[0]
    assert list(TrainingBatches(lengths, chosen, batch_tokens, batch_size, 4, row_tokens)) != epochs[0]


@pytest.mark.parametrize("mean", [50, 180, 400])
def test_training_batches_hold_as_many_examples_as_they_may(mean: int) -> None:
    """Where the tokens allow it every batch has batch_size examples, and packing leaves less padding than padding."""
    lengths = np.random.default_rng(0).normal(mean, mean / 4, size=2048).clip(8, 2048).astype(int)
    packed = TrainingBatches(lengths, range(2048), 8192, 16, row_tokens=2048)
    assert {sum(map(len, batch)) for batch in packed} == {16}
    assert padding_share(lengths, packed) < padding_share(lengths, TrainingBatches(lengths, range(2048), 8192, 16))


def test_training_batches_are_full_where_tokens_are_the_limit() -> None:
    """Long examples of mixed lengths fill all but a few hundredths of the budget, in fewer steps than padded ones."""
    lengths = np.random.default_rng(0).integers(10, 1500, size=2000)
    packed = TrainingBatches(lengths, range(2000), 8192, 64, row_tokens=2048)
    assert len(packed) < 1.02 * lengths.sum() / 8192 < len(TrainingBatches(lengths, range(2000), 8192, 64))


def test_few_batches_never_outnumber_full_rows() -> None:
    """Dealing examples out is kept only where it saves steps."""
    for seed in range(20):
        generator = np.random.default_rng(seed)
        lengths = generator.integers(1, generator.integers(2, 65), size=generator.integers(1, 100))
        chosen = range(len(lengths))
        few = few_packed_batches(lengths, 300, 64, 7, chosen)
        assert ids(few) == list(chosen)
        assert_within(few, lengths, 300, 64, 7)
        assert len(few) <= len(packed_batches(lengths, 300, 64, 7, chosen))


def test_few_batches_keep_rows_within_their_length() -> None:
    """Two rows of 9 and 8 + 3 tokens would do for a single batch of 23, but a row may hold no more than 10."""
    assert few_packed_batches([8, 9, 3], 23, 11, 3, [0, 1, 2]) == [[[0, 2], [1]]]
    assert few_packed_batches([8, 9, 3], 23, 10, 3, [0, 1, 2]) == [[[1], [0]], [[2]]]


def test_padding_share_by_hand() -> None:
    """The share is counted over rows as wide as their batch's fullest, whether a row is an example or several."""
    lengths = [4, 3, 1, 2]
    assert padding_share(lengths, [[0, 1], [3, 2]]) == pytest.approx(2 / 12)
    assert padding_share(lengths, [[[0], [1, 2]], [[3]]]) == 0
    assert padding_share(lengths, [[[0], [1]], [[3], [2]]]) == padding_share(lengths, length_batches(lengths, 8))
    assert padding_share(lengths, []) == 0
