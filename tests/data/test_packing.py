from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dualsft.data import collate_packed, pack_rows
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
