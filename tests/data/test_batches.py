from typing import Any

import numpy as np
import pytest
import torch

from dualsft.data.batches import TrainingBatches, collate, length_batches
from dualsft.errors import UserError

CASES = [(seed, batch_tokens, batch_size) for seed in range(4) for batch_tokens in (64, 200) for batch_size in (1, 5)]


def some_lengths(seed: int, count: int = 333) -> np.ndarray:
    """Lengths from 0 to 64."""
    return np.random.default_rng(seed).integers(0, 65, size=count)


def cost(batch: list[Any], lengths: np.ndarray) -> int:
    """Tokens that a batch costs, padding included."""
    return len(batch) * int(lengths[batch].max())


def test_collate_pads_on_the_right() -> None:
    """Rows are padded at their end; padding has mask 0 and no label, and the rest is untouched."""
    rows = [
        {"example_id": 7, "input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"example_id": 3, "input_ids": [9], "labels": [-100]},
    ]
    batch = collate(rows, pad_token_id=2)
    assert batch["example_id"].tolist() == [7, 3]
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(("seed", "batch_tokens", "batch_size"), CASES)
def test_length_batches_keep_their_promises(seed: int, batch_tokens: int, batch_size: int) -> None:
    """Each example occurs once, the longest first, ties by id, and no batch exceeds either limit."""
    lengths = some_lengths(seed)
    for size in (None, batch_size):
        batches = length_batches(lengths, batch_tokens, size)
        order = [example for batch in batches for example in batch]
        assert order == sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        assert all(cost(batch, lengths) <= batch_tokens for batch in batches)
        assert all(size is None or len(batch) <= size for batch in batches)
        assert list(batches) == list(length_batches(lengths.tolist(), batch_tokens, size))


def test_length_batches_are_full() -> None:
    """A batch ends only where one more example would break a limit."""
    lengths = some_lengths(0)
    batches = length_batches(lengths, 200, 7)
    for batch in batches[:-1]:
        assert len(batch) == 7 or (len(batch) + 1) * lengths[batch].max() > 200


def test_length_batches_of_some() -> None:
    """Only the ids asked for are batched, under their own names, in whatever order they are given."""
    lengths = some_lengths(1)
    ids = [300, 4, 17, 5]
    batches = length_batches(lengths, 64, ids=ids)
    assert sorted(example for batch in batches for example in batch) == sorted(ids)
    assert list(batches) == list(length_batches(lengths, 64, ids=ids[::-1]))
    assert list(length_batches(lengths, 64, ids=[])) == []
    assert [list(batches[1:][::-1]), batches[-1]] == [list(batches)[:0:-1], list(batches)[-1]]


def test_too_long_an_example_is_named() -> None:
    """An example beyond the budget is named with its length, the budget and the two ways out."""
    message = r"Example 2 has 9 tokens, more than data\.batch_tokens=8: raise data\.batch_tokens or lower data\.max_len"
    with pytest.raises(UserError, match=message):
        length_batches([3, 8, 9], 8)
    with pytest.raises(UserError, match=message):
        TrainingBatches([3, 8, 9], [1, 2], 8, 4)
    assert list(length_batches([3, 8, 9], 8, ids=[1])) == [[1]]


@pytest.mark.parametrize(("seed", "batch_tokens", "batch_size"), CASES)
def test_training_batches_keep_their_promises(seed: int, batch_tokens: int, batch_size: int) -> None:
    """Every epoch has the same batches, each example once, within both limits, and as many as announced."""
    lengths = some_lengths(seed)
    ids = list(range(0, len(lengths), 2))
    sampler = TrainingBatches(lengths, ids, batch_tokens, batch_size, seed)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    for batches in epochs:
        assert sorted(batches) == sorted(epochs[0])
        assert sorted(example for batch in batches for example in batch) == ids
        assert all(cost(batch, lengths) <= batch_tokens and len(batch) <= batch_size for batch in batches)
        assert len(batches) == len(sampler)
    assert epochs[0] != epochs[1] != epochs[2]


def test_training_batches_follow_the_seed() -> None:
    """The same seed and epoch give the same order, in whatever sequence epochs are visited; another seed does not."""
    lengths = some_lengths(0)
    one, same, other = (TrainingBatches(lengths, range(333), 200, 5, seed) for seed in (3, 3, 4))
    first = list(one)
    one.set_epoch(1)
    same.set_epoch(1)
    assert list(one) == list(same)
    one.set_epoch(0)
    assert list(one) == first != list(other)


def test_training_batches_waste_little() -> None:
    """Sorting within windows keeps padding well under what shuffled batches of the same size would carry."""
    lengths = np.random.default_rng(0).integers(10, 500, size=4000)
    sampler = TrainingBatches(lengths, range(4000), 100_000, 8)
    padded = sum(cost(batch, lengths) for batch in sampler)
    assert padded < 1.15 * lengths.sum()
    assert len({len(batch) for batch in sampler}) == 1


def test_empty_set_of_ids() -> None:
    """No ids give no batches rather than an error: the caller knows what that means."""
    assert list(TrainingBatches([1, 2], [], 8, 2)) == []
