from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dualsft.data.batches import TrainingBatches, length_batches, padding_share
from dualsft.data.packing import collate_packed, few_packed_batches, pack_rows, packed_batches
from dualsft.errors import UserError

PAD = 3


def some_lengths(seed: int, count: int = 300, longest: int = 64) -> np.ndarray:
    """Lengths from 1 to the longest, many of them equal."""
    return np.random.default_rng(seed).integers(1, longest + 1, size=count)


def best_fit(lengths: np.ndarray, ids: list[int], row_tokens: int, max_examples: int | None) -> list[list[int]]:
    """Best-fit decreasing by looking at every row for every example."""
    rows: list[list[int]] = []
    for example in sorted(ids, key=lambda i: (-lengths[i], i)):
        room = [row_tokens - int(lengths[row].sum()) for row in rows]
        fitting = [
            (room[place], place)
            for place, row in enumerate(rows)
            if room[place] >= lengths[example] and (max_examples is None or len(row) < max_examples)
        ]
        if fitting:
            rows[min(fitting)[1]].append(example)
        else:
            rows.append([example])
    return rows


def some_rows(seed: int) -> list[list[dict[str, Any]]]:
    """Four rows of examples of 1 to 9 tokens, every one of which has a label at its first token."""
    generator = np.random.default_rng(seed)
    rows = []
    for place in range(4):
        row = []
        for number in range(int(generator.integers(1, 5))):
            ids = generator.integers(4, 99, size=generator.integers(1, 10)).tolist()
            row.append({"example_id": 10 * number + place, "input_ids": ids, "labels": [token + 100 for token in ids]})
        rows.append(row)
    return rows


def tail(values: Tensor, row: list[dict[str, Any]]) -> list[int]:
    """What stands behind a row's last example."""
    return values[sum(len(example["input_ids"]) for example in row) :].tolist()


@pytest.mark.parametrize("max_examples", [None, 1, 2, 5])
@pytest.mark.parametrize(("seed", "row_tokens"), [(0, 64), (1, 65), (2, 128), (3, 300), (4, 100_000)])
def test_rows_are_those_of_best_fit_decreasing(seed: int, row_tokens: int, max_examples: int | None) -> None:
    """The rows are those that the slow obvious algorithm makes; each id occurs once, within both limits."""
    lengths = some_lengths(seed)
    ids = list(range(0, 300, 2))
    rows = pack_rows(lengths, ids, row_tokens, max_examples)
    assert rows == best_fit(lengths, ids, row_tokens, max_examples)
    assert sorted(example for row in rows for example in row) == ids
    assert all(lengths[row].sum() <= row_tokens for row in rows)
    assert all(max_examples is None or len(row) <= max_examples for row in rows)


def test_rows_do_not_depend_on_the_order_of_the_ids() -> None:
    """The same examples give the same rows in whatever order they are named, from an array or a list of lengths."""
    lengths = some_lengths(0)
    shuffled = np.random.default_rng(1).permutation(300).tolist()
    assert pack_rows(lengths, range(300), 100) == pack_rows(lengths.tolist(), shuffled, 100)
    assert pack_rows(lengths, [], 100) == []


def test_rows_of_text_are_nearly_full() -> None:
    """With lengths like those of instruction data less than a thousandth of all rows is left empty."""
    lengths = np.random.default_rng(0).lognormal(5.5, 0.8, size=20_000).clip(8, 2048).astype(int)
    rows = pack_rows(lengths, range(20_000), 2048)
    assert lengths.sum() > 0.999 * 2048 * (len(rows) - 1)


def test_too_long_an_example_is_named() -> None:
    """An example beyond a row is named with its length, the row's and the two ways out; one that just fits is not."""
    message = r"Example 2 has 9 tokens, more than fit into a row of 8: raise data\.batch_tokens or lower data\.max_len"
    with pytest.raises(UserError, match=message):
        pack_rows([3, 8, 9], [0, 1, 2], 8)
    assert pack_rows([3, 8, 9], [0, 1], 8) == [[1], [0]]


def test_collate_packed_by_hand() -> None:
    """Examples lie end to end, each counts its positions from 0, and so does the padding of a shorter row."""
    rows = [
        [
            {"example_id": 7, "input_ids": [5, 6, 7], "labels": [5, 6, 7]},
            {"example_id": 2, "input_ids": [8, 9], "labels": [8, 9]},
        ],
        [{"example_id": 4, "input_ids": [11, 12], "labels": [-100, 12]}],
    ]
    batch = collate_packed(rows, PAD)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "example_id": [7, 2, 4],
        "input_ids": [[5, 6, 7, 8, 9], [11, 12, PAD, PAD, PAD]],
        "labels": [[-100, 6, 7, -100, 9], [-100, 12, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]],
        "spans": [[0, 0, 3], [0, 3, 2], [1, 0, 2]],
    }
    assert {values.dtype for values in batch.values()} == {torch.int64}


@pytest.mark.parametrize("seed", range(8))
def test_spans_give_every_example_back(seed: int) -> None:
    """Cut out by its span, an example has its ids, its labels but for the first, and positions of its own."""
    rows = some_rows(seed)
    batch = collate_packed(rows, PAD)
    examples = [example for row in rows for example in row]
    assert batch["example_id"].tolist() == [example["example_id"] for example in examples]
    for (row, first, length), example in zip(batch["spans"].tolist(), examples, strict=True):
        cut = {name: batch[name][row, first : first + length].tolist() for name in ("input_ids", "labels")}
        assert cut == {"input_ids": example["input_ids"], "labels": [-100, *example["labels"][1:]]}
        assert batch["position_ids"][row, first : first + length].tolist() == list(range(length))


@pytest.mark.parametrize("seed", range(8))
def test_padding_is_a_run_of_its_own(seed: int) -> None:
    """The fullest row has no padding; elsewhere it has the padding's id, no label, and positions from 0."""
    rows = some_rows(seed)
    batch = collate_packed(rows, PAD)
    widths = [sum(len(example["input_ids"]) for example in row) for row in rows]
    assert batch["input_ids"].shape == (4, max(widths))
    for place, row in enumerate(rows):
        count = max(widths) - widths[place]
        assert tail(batch["input_ids"][place], row) == [PAD] * count
        assert tail(batch["labels"][place], row) == [-100] * count
        assert tail(batch["position_ids"][place], row) == list(range(count))


LIMITS = [(64, 64), (200, 64), (1000, 200)]
"""Tokens of a batch, and of a row."""


def ids(batches: list[Any]) -> list[int]:
    """The ids in all batches, ascending."""
    return sorted(example for batch in batches for row in batch for example in row)


def assert_within(
    batches: list[Any], lengths: np.ndarray, batch_tokens: int, row_tokens: int, batch_size: int | None
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
    lengths = some_lengths(0, 333)
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
    lengths = some_lengths(0, 333)
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
    lengths = some_lengths(1, 333)
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
    assert {len(ids([batch])) for batch in packed} == {16}
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
