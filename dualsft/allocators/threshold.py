"""The k-th largest of any number of entries, exactly, in memory that does not grow with them.

A sample of the entries says between which two values the k-th largest probably lies. One sweep counts the entries above
this bracket, and those inside by their keys: integers in the order of the values. Where every key has a bin of its own,
the counts give the threshold. Where they do not, or where the sample was wrong, the next sweep has a narrower bracket
or another one, so that the sample decides the time and not the result. Four sweeps are the most.

Entries come as numpy arrays in blocks that stay in a processor's cache, where a comparison takes a tenth of the time of
an operation of torch on a tensor that does not.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

Value = np.float32 | np.int32
Values = Float32[np.ndarray, " entry"] | Int32[np.ndarray, " entry"]
Blocks = Iterable[tuple[Values, Bool[np.ndarray, " entry"] | None]]
"""Values, and which of them no longer count; None if all do."""

BLOCK = 2**17
"""Entries that are looked at together: half a megabyte of float32."""
NO_ORDER = "scores hold NaN"
_BINS = 2**20
_DEVIATIONS = 4
"""Half the width of a bracket, in standard deviations of the sample's quantile: one in ten thousand misses."""


class Threshold(NamedTuple):
    """The k-th largest value, how many entries equal to it are among the k largest, and whether all of them are."""

    value: Value
    ties: int
    all_ties: bool


def sampling_stride(entries: int) -> int:
    """Every how many-th entry is in a sample: all of a few, 2¹⁶ to 2²⁰ of many.

    It is odd, as the lengths of most rows are even: otherwise a sample would have entries of few columns.
    """
    return max(min(64, entries >> 16), entries >> 20) | 1


def bracket(sample: Values, k: int, entries: int) -> tuple[Value, Value]:
    """The lowest and the highest value that the k-th largest entry probably has; its own if the sample has all entries.

    Raises:
        ValueError: if a value is NaN.
    """
    refuse_nan(sample)
    lowest, highest = _ends(sample.dtype)
    count, share = len(sample), k / entries
    if count == entries:
        first = last = k
    else:
        spread = _DEVIATIONS * math.sqrt(count * share * (1 - share)) + 1
        first, last = math.floor(count * share - spread), math.ceil(count * share + spread)
    places = [count - place for place in (last, first) if 1 <= place <= count]
    found = iter(np.partition(sample, places)[places] if places else ())
    return next(found) if 1 <= last <= count else lowest, next(found) if 1 <= first <= count else highest


class Counts(NamedTuple):
    """What a sweep over some entries has counted, for a bracket of keys that is cut into bins.

    Attributes:
        above: Entries above the bracket.
        unordered: Entries that are NaN.
        bins: The numbers of the bins that have any entries, ascending.
        entries: How many each of these has.
        size: How many bins there are.
    """

    above: int
    unordered: int
    bins: Int64[np.ndarray, " bin"]
    entries: Int64[np.ndarray, " bin"]
    size: int

    @classmethod
    def merged(cls, parts: Sequence["Counts"]) -> "Counts":
        """Those of all entries, of those of parts of them."""
        bins, place = np.unique(np.concatenate([part.bins for part in parts]), return_inverse=True)
        entries = np.zeros(len(bins), np.int64)
        np.add.at(entries, place, np.concatenate([part.entries for part in parts]))
        above, unordered = sum(part.above for part in parts), sum(part.unordered for part in parts)
        return cls(above, unordered, bins, entries, parts[0].size)

    def dense(self) -> Int64[np.ndarray, " count"]:
        """All of them as one vector: such vectors of parts can be added up."""
        vector = np.zeros(self.size + 2, np.int64)
        vector[self.bins] = self.entries
        vector[-2:] = self.above, self.unordered
        return vector

    @classmethod
    def of_dense(cls, vector: Int64[np.ndarray, " count"]) -> "Counts":
        """The inverse of `dense`."""
        bins = np.flatnonzero(vector[:-2])
        return cls(int(vector[-2]), int(vector[-1]), bins, vector[bins], len(vector) - 2)


def kth_largest(
    sweep: Callable[[], Blocks],
    k: int,
    within: tuple[Value, Value],
    add_up: Callable[[Counts], Counts] = lambda counts: counts,
) -> Threshold:
    """Find the k-th largest value that counts.

    Args:
        sweep: Yields all entries; called once for each bracket.
        k: From 1 to the number of entries that count.
        within: The bracket to begin with.
        add_up: Adds up counts over those who each sweep over some of the entries.

    Raises:
        ValueError: if there is no such entry, or a value is NaN.
    """
    dtype = np.dtype(type(within[0]))
    lowest, highest = map(key_of, _ends(dtype))
    low, high = map(key_of, within)
    while True:
        shift = max(0, (high - low).bit_length() - _BINS.bit_length() + 1)
        counts = add_up(_count(sweep(), low, high, shift, dtype))
        if counts.unordered:
            raise ValueError(NO_ORDER)
        at_least = counts.entries[::-1].cumsum()  # from the highest bin on
        rank, inside = k - counts.above, int(counts.entries.sum())
        if k < 1 or (rank > inside and low == lowest):
            raise ValueError(f"cannot choose {k} of {counts.above + inside}")
        if rank < 1:
            low, high = high + 1, highest
        elif rank > inside:
            low, high = lowest, low - 1
        else:
            place = len(at_least) - 1 - int(at_least.searchsorted(rank))
            low += int(counts.bins[place]) << shift
            if shift == 0:
                ties = rank - int(counts.entries[place + 1 :].sum())
                return Threshold(value_of(low, dtype), ties, ties == int(counts.entries[place]))
            high = min(high, low + (1 << shift) - 1)


def count_ties(values: Values, taken: Bool[np.ndarray, " entry"] | None, threshold: Threshold) -> int:
    """Count a block's entries at a threshold that still count."""
    at_threshold = values == threshold.value
    return int(np.count_nonzero(at_threshold if taken is None else at_threshold > taken))


def mark(chosen: Bool[np.ndarray, " entry"], values: Values, threshold: Threshold, ties: int) -> int:
    """Choose a block's entries above a threshold, and the first of those at it that are not chosen yet.

    Args:
        chosen: Which entries are chosen; changed in place.
        values: Their values.
        threshold: What `kth_largest` found.
        ties: The most entries at the threshold to choose, those of earlier blocks left out.

    Returns:
        The number of entries at the threshold that were chosen; 0 if all of all blocks are.
    """
    if threshold.all_ties:
        chosen |= values >= threshold.value
        return 0
    at_threshold = np.flatnonzero((values == threshold.value) > chosen)[:ties] if ties else np.zeros(0, np.int64)
    chosen |= values > threshold.value
    chosen[at_threshold] = True
    return len(at_threshold)


def _count(blocks: Blocks, low: int, high: int, shift: int, dtype: np.dtype) -> Counts:
    """Count the values above a bracket of keys, and those inside it, 2^shift keys to a bin."""
    bottom, top = value_of(low, dtype), value_of(high, dtype)
    size = ((high - low) >> shift) + 1
    above = unordered = waiting = 0
    found: list[np.ndarray] = []
    dense = np.zeros(0, np.int64)  # of a bin each, once there are many values inside
    for values, taken in blocks:
        over = values > top
        inside = (values < bottom) == over  # neither; so is NaN
        if taken is not None:
            over, inside = over > taken, inside > taken
        above += int(np.count_nonzero(over))
        found.append(values[inside])
        waiting += len(found[-1])
        if waiting >= _BINS:
            numbers = _bin_numbers(found, low, shift)
            unordered += waiting - len(numbers)
            dense = np.bincount(numbers, minlength=size) + (dense if len(dense) else 0)
            found, waiting = [], 0
    numbers = _bin_numbers(found, low, shift)
    unordered += waiting - len(numbers)
    if len(dense):
        dense += np.bincount(numbers, minlength=size)
        bins = np.flatnonzero(dense)
        return Counts(above, unordered, bins, dense[bins], size)
    return Counts(above, unordered, *np.unique(numbers, return_counts=True), size)


def _bin_numbers(found: list[np.ndarray], low: int, shift: int) -> Int64[np.ndarray, " entry"]:
    """The numbers of the bins of all values but NaN."""
    values = np.concatenate(found) if found else np.zeros(0, np.int32)
    return (keys_of(values[~np.isnan(values)]) - low) >> shift


def refuse_nan(values: Values) -> None:
    """Raise a ValueError if a value is NaN, which has no place in an order."""
    if np.isnan(values).any():
        raise ValueError(NO_ORDER)


def keys_of(values: Values) -> Int64[np.ndarray, " entry"]:
    """Integers in the order of the values; -0.0 and 0.0 share one, and there is no gap between two."""
    if values.dtype == np.int32:
        return values.astype(np.int64)
    bits = values.view(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits).astype(np.int64)


def key_of(value: Value) -> int:
    """The key of one value."""
    return int(keys_of(np.array([value]))[0])


def value_of(key: int, dtype: np.dtype) -> Value:
    """The value of a type, float32 or int32, that has a key."""
    if dtype == np.int32:
        return np.int32(key)
    size: np.float32 = np.array([abs(key)], np.int32).view(np.float32)[0]
    return np.copysign(size, np.float32(key))


def _ends(dtype: np.dtype) -> tuple[Value, Value]:
    """The lowest and the highest value of a type."""
    if dtype == np.int32:
        return np.int32(np.iinfo(np.int32).min), np.int32(np.iinfo(np.int32).max)
    return np.float32(-np.inf), np.float32(np.inf)
