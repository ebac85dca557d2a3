"""The threshold and its ties are those of a sort, whatever the sample, the bins and the blocks."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dualsft.allocators import threshold as module
from dualsft.allocators.threshold import Blocks, bracket, key_of, keys_of, kth_largest, sampling_stride, value_of
from tests.allocators.cases import SPECIAL

INTEGERS = np.array([-(2**31), 2**31 - 1, 0, -1, 1, 5], np.int32)
KINDS: dict[str, Any] = {
    "normal": lambda draw, size: draw.standard_normal(size),
    "ties": lambda draw, size: draw.standard_normal(size).round(),
    "one value": lambda draw, size: np.full(size, -2.5),
    "mostly zeros": lambda draw, size: draw.choice(
        [0.0, -0.0, 1e-45, -1e-45, 3.0], size, p=[0.4, 0.4, 0.05, 0.05, 0.1]
    ),
    "wide": lambda draw, size: draw.standard_normal(size) * 10.0 ** draw.integers(-44, 38, size),
    "special": lambda draw, size: draw.choice(SPECIAL.numpy(), size),
    "sorted": lambda draw, size: np.sort(draw.standard_normal(size)),
}


def float_values(kind: str, size: int) -> np.ndarray:
    """Float32 values of one of the `KINDS`."""
    return KINDS[kind](np.random.default_rng(size), size).astype(np.float32)


def in_blocks(values: np.ndarray, taken: np.ndarray | None = None, size: int = 37) -> Iterator[tuple[Any, Any]]:
    """Values in blocks of this size."""
    for first in range(0, len(values), size):
        yield values[first : first + size], None if taken is None else taken[first : first + size]


def by_sort(values: np.ndarray, k: int) -> tuple[float, int, bool]:
    """The k-th largest, how many equal to it are among the k largest, and whether that is all of them."""
    value = np.sort(values)[-k]
    ties = k - int((values > value).sum())
    return value, ties, ties == int((values == value).sum())


@pytest.mark.parametrize("bins", [2**10, 2**20])
@pytest.mark.parametrize("kind", KINDS)
def test_any_bracket_leads_to_the_threshold_of_a_sort(kind: str, bins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is right, too high, too low, everything or a single value; the k-th largest from first to last."""
    monkeypatch.setattr(module, "_BINS", bins)
    values = float_values(kind, 300)
    least, most = np.float32(-np.inf), np.float32(np.inf)
    brackets = [
        (least, most),
        (least, least),
        (most, most),
        (np.float32(-0.0), np.float32(0.0)),
        (values[0], values[0]),
    ]
    for k in [1, 300, *random.Random(kind).sample(range(2, 300), 2)]:
        for within in [*brackets, bracket(values[::7], k, 300), bracket(values, k, 300)]:
            assert kth_largest(lambda: in_blocks(values), k, within) == by_sort(values, k)


def test_entries_that_are_taken_do_not_count() -> None:
    """Neither above the threshold, nor at it, nor below."""
    values = float_values("ties", 300)
    taken = np.random.default_rng(1).random(300) < 0.4
    free = values[~taken]
    for k in (1, 50, len(free)):
        within = bracket(free, k, len(free))
        assert kth_largest(lambda: in_blocks(values, taken), k, within) == by_sort(free, k)


def test_integers_have_thresholds_too() -> None:
    """From the lowest to the highest of 32 bits."""
    for k in range(1, 7):
        for within in [(INTEGERS[0], INTEGERS[1]), (INTEGERS[2], INTEGERS[2]), bracket(INTEGERS, k, 6)]:
            assert kth_largest(lambda: in_blocks(INTEGERS, size=4), k, within) == by_sort(INTEGERS, k)


def test_a_sample_that_is_right_takes_one_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A good sample decides the time: everything is looked at once, and few entries are counted."""
    values, sweeps = float_values("normal", 20_000), []
    monkeypatch.setattr(module, "_BINS", 2**24)

    def sweep() -> Blocks:
        sweeps.append(1)
        return in_blocks(values)

    within = bracket(values[::5], 2_000, 20_000)
    assert kth_largest(sweep, 2_000, within) == by_sort(values, 2_000)
    assert len(sweeps) == 1
    assert np.mean((values >= within[0]) & (values <= within[1])) < 0.05


def test_at_most_four_sweeps_are_made() -> None:
    """Of a sample that misled and a range with more keys than bins."""
    sweeps = []
    values = np.concatenate([float_values("wide", 5000), np.zeros(5000, np.float32)])

    def sweep() -> Blocks:
        sweeps.append(1)
        return in_blocks(values, size=4096)

    assert kth_largest(sweep, 9_000, (np.float32(1), np.float32(1))) == by_sort(values, 9_000)
    assert len(sweeps) <= 4


@pytest.mark.parametrize("k", [0, 6])
def test_more_than_there_is_cannot_be_chosen(k: int) -> None:
    """K must lie between 1 and the number of entries."""
    values = np.ones(5, np.float32)
    with pytest.raises(ValueError, match=f"cannot choose {k} of 5"):
        kth_largest(lambda: in_blocks(values), k, (values[0], values[0]))


def test_nan_has_no_place() -> None:
    """In a sample or outside of it, above the threshold or below."""
    values = np.array([3.0, np.nan, 1.0, 2.0], np.float32)
    with pytest.raises(ValueError, match="NaN"):
        bracket(values, 1, 4)
    for end in (np.float32(0.5), np.float32(2), np.float32(5)):
        with pytest.raises(ValueError, match="NaN"):
            kth_largest(lambda: in_blocks(values), 1, (end, end))


def test_keys_keep_the_order_of_floats() -> None:
    """Keys compare as their floats do, the two zeros share one, and each key has its float."""
    values = np.concatenate([SPECIAL.numpy(), float_values("wide", 100)])
    keys = keys_of(values)
    assert np.array_equal(keys[:, None] < keys, values[:, None] < values)
    assert all(value_of(key_of(value), values.dtype) == value for value in values)


def test_samples_are_neither_small_nor_large() -> None:
    """All of a few entries; from 2¹⁵ to 2²⁰ of many, and never one column of a matrix alone."""
    assert sampling_stride(0) == sampling_stride(2**17 - 1) == 1
    for entries in (2**17, 2**20, 2**24, 2**30, 2**36):
        assert 2**15 <= entries // sampling_stride(entries) <= 2**20
        assert sampling_stride(entries) % 2
