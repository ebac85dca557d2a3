"""Numbers of examples in arrays, against a dictionary."""

import pickle
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualsft.matrix.example_values import ExampleValues

IDS = st.integers(0, 5000)
BATCHES = st.lists(st.dictionaries(IDS, st.floats(allow_nan=False), max_size=70), max_size=40)
"""What is added at a time; an example that comes again is left out of the later ones."""


def added(batches: list[dict[int, float]]) -> tuple[ExampleValues, dict[int, float]]:
    """The same numbers in arrays and in a dictionary."""
    found, slow = ExampleValues(), dict[int, float]()
    for batch in batches:
        new = {i: value for i, value in batch.items() if i not in slow}
        found.add([*new], [*new.values()])
        slow |= new
        assert len(found) == len(slow)
    return found, slow


@given(BATCHES, st.lists(IDS, max_size=20))
def test_it_is_read_like_a_dictionary(batches: list[dict[int, float]], asked: list[int]) -> None:
    """In the same order, with Python's own numbers; also once pickled, made of a mapping, or grown after a look."""
    found, slow = added(batches)
    for same in (found, pickle.loads(pickle.dumps(found)), ExampleValues.of(slow)):
        assert [*same] == [*same.keys()] == [*slow]
        assert [*same.values()] == [*slow.values()]
        assert [*same.items()] == [*slow.items()]
        assert same == slow
        assert slow == same
        assert bool(same) == bool(slow)
        assert {type(i) for i in same} <= {int}
        assert {type(value) for value in same.values()} <= {float}
        for i in asked:
            assert (i in same) == (i in slow)
            assert same.get(i) == slow.get(i)
    found.add(range(5001, 9001), [0.5] * 4000)
    assert found[5001] == 0.5
    assert found == slow | dict.fromkeys(range(5001, 9001), 0.5)


@given(BATCHES, st.lists(IDS, max_size=20), st.randoms())
def test_arrays_at_once_are_examples_one_by_one(
    batches: list[dict[int, float]], asked: list[int], draw: Random
) -> None:
    """Looked up in any order, asked for, left out, and joined."""
    found, slow = added(batches)
    shuffled = sorted(slow, key=lambda _: draw.random())
    for order in (shuffled, [*slow]):
        assert found.at(np.array(order, np.int64)).tolist() == [slow[i] for i in order]
    assert found.has(np.array([-1, *asked])).tolist() == [False, *(i in slow for i in asked)]
    assert [*found.without(set(asked)).items()] == [(i, value) for i, value in slow.items() if i not in asked]
    kept = np.array([draw.random() < 0.5 for _ in slow], bool)
    assert ExampleValues.joined([found.where(kept), found.where(~kept)]) == slow


def test_numbers_are_kept_bit_by_bit() -> None:
    """The sign of zero, the smallest number, and those that are none."""
    odd = np.array([-0.0, 5e-324, np.nan, -np.inf, 1 / 3])
    found = ExampleValues()
    for i, value in enumerate(odd.tolist()):
        found.add([i], [value])
    assert found.numbers.tobytes() == odd.tobytes()
    assert found.at(np.arange(5)).tobytes() == odd.tobytes()


def test_what_is_not_there_is_refused() -> None:
    """By its number, whether one is asked for or several; so are an example with two numbers, and one without."""
    found = ExampleValues([7, 3], [0.5, 1.5])
    for i in (0, 8, -1):
        with pytest.raises(KeyError, match=str(i)):
            found[i]
        with pytest.raises(KeyError, match=str(i)):
            found.at(np.array([3, i]))
    for key in ("3", None, 1.5):
        assert key not in found
    assert np.int32(3) in found
    with pytest.raises(ValueError, match="two numbers"):
        ExampleValues([1, 2, 1], [0.0, 0.0, 0.0])[1]
    with pytest.raises(ValueError, match="1 numbers for 2 examples"):
        ExampleValues([1, 2], [0.0])


def test_others_do_not_grow_with_it() -> None:
    """What was made of it stays as it was, and an array of it that was given away is a copy."""
    found = ExampleValues(range(3), [1.0, 2.0, 3.0])
    same, ids = found.where(np.ones(3, bool)), found.ids
    other = ExampleValues(ids, found.numbers)
    found.at(ids)[:] = 0
    found.add([3], [4.0])
    assert same is found
    assert [*other.items()] == [(0, 1.0), (1, 2.0), (2, 3.0)]
    assert [*found.values()] == [1.0, 2.0, 3.0, 4.0]
