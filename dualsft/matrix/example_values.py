"""A number for each of very many examples, in arrays: 16 bytes an example, where a dictionary takes some 100."""

from collections.abc import Collection, ItemsView, Iterable, Iterator, Mapping, Sequence, Sized, ValuesView
from operator import index
from typing import Any, final

import numpy as np
from jaxtyping import Bool, Float, Int

ExampleIds = Int[np.ndarray, " example"]
"""Ids of some examples."""

_FEWEST = 2**10
"""Examples that there is room for once there are any to add."""


@final
class ExampleValues(Mapping[int, float]):
    """Example id -> a number, float64, in the order in which they were added.

    It is read like a dictionary, and what concerns all examples is done with arrays. Ids are row numbers: an array of 4
    bytes for each row up to the largest finds examples by id; it is kept only once a single one has been asked for.

    Args:
        ids: Ids of different examples.
        values: Their numbers. Arrays of the right types are not copied; they must not be modified.
    """

    def __init__(self, ids: Iterable[int] = (), values: Iterable[float] = ()) -> None:
        self._ids, self._values = _array(ids, np.int64), _array(values, np.float64)
        self._count = len(self._ids)
        if len(self._values) != self._count:
            raise ValueError(f"{len(self._values)} numbers for {self._count} examples")
        self._places: np.ndarray | None = None

    @classmethod
    def of(cls, values: Mapping[int, Any]) -> "ExampleValues":
        """A mapping in arrays; itself if it is."""
        return values if isinstance(values, ExampleValues) else cls(values.keys(), values.values())

    @classmethod
    def joined(cls, parts: Sequence["ExampleValues"]) -> "ExampleValues":
        """Those of different examples, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate([getattr(part, of) for part in parts]) for of in ("ids", "numbers")))

    @property
    def ids(self) -> ExampleIds:
        """The ids, in order; not to be modified."""
        return self._ids[: self._count]

    @property
    def numbers(self) -> Float[np.ndarray, " example"]:
        """The numbers, in order; not to be modified."""
        return self._values[: self._count]

    def add(self, ids: Sequence[int], values: Any) -> None:
        """Add examples that are not there yet; the memory of those there is copied only when their number doubles."""
        start, end = self._count, self._count + len(ids)
        if end > len(self._ids):
            room = max(2 * end, _FEWEST)
            self._ids = _with_room(self.ids, room)  # one after the other: never both twice
            self._values = _with_room(self.numbers, room)
        self._ids[start:end], self._values[start:end] = ids, values
        self._count, self._places = end, None

    def at(self, ids: Int[np.ndarray, " some"]) -> Float[np.ndarray, " some"]:
        """A new array of the numbers of these examples.

        Raises:
            KeyError: if one is not there.
        """
        if np.array_equal(ids, self.ids):
            return self.numbers.copy()
        places = self._places_of(ids)
        if len(lost := np.flatnonzero(places < 0)):
            raise KeyError(int(ids[lost[0]]))
        return self.numbers[places]

    def has(self, ids: Int[np.ndarray, " some"]) -> Bool[np.ndarray, " some"]:
        """Whether each of these examples is there."""
        return self._places_of(ids) >= 0

    def where(self, kept: Bool[np.ndarray, " example"]) -> "ExampleValues":
        """Those of some of the examples, in the same order; itself if all are kept."""
        return self if kept.all() else ExampleValues(self.ids[kept], self.numbers[kept])

    def without(self, ids: Collection[int]) -> "ExampleValues":
        """Those of all but these examples."""
        return self.where(~np.isin(self.ids, _array(ids, np.int64)))

    def _places_of(self, ids: Int[np.ndarray, " some"]) -> Int[np.ndarray, " some"]:
        """The place of each example; -1 where it is not there."""
        table = self._table() if self._places is None else self._places
        return table[np.where((ids >= 0) & (ids < len(table)), ids, -1)]

    def _table(self) -> Int[np.ndarray, " row"]:
        """Id -> place, or -1; the last entry is that of no id."""
        kind, places = (np.int32 if self._count < 2**31 else np.int64), np.arange(self._count)
        table = np.full(int(self.ids.max(initial=-1)) + 2, -1, kind)
        table[self.ids] = places
        if not np.array_equal(table[self.ids], places):
            raise ValueError("an example has two numbers")
        return table

    def __getitem__(self, example: int) -> float:
        if self._places is None:
            self._places = self._table()
        try:
            row = index(example)
        except TypeError as error:  # as a dictionary says of what is no id
            raise KeyError(example) from error
        place = self._places[row] if 0 <= row < len(self._places) else -1
        if place < 0:
            raise KeyError(example)
        return float(self._values[place])

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids.data)  # Python's own numbers, one at a time

    def __len__(self) -> int:
        return self._count

    def values(self) -> ValuesView[float]:
        """The numbers, in order."""
        return _Values(self)

    def items(self) -> ItemsView[int, float]:
        """Ids with their numbers, in order."""
        return _Items(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return ExampleValues, (self.ids, self.numbers)  # without what is spare


def ids_without(ids: ExampleIds, others: Collection[int]) -> Int[np.ndarray, " left"]:
    """The ids, in the same order, except for others."""
    return ids[~np.isin(ids, _array(others, np.int64))]


class _Values(ValuesView[float]):
    _mapping: ExampleValues

    def __iter__(self) -> Iterator[float]:
        return iter(self._mapping.numbers.data)


class _Items(ItemsView[int, float]):
    _mapping: ExampleValues

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return zip(self._mapping, self._mapping.values(), strict=True)


def _array(values: Iterable[Any], kind: type[np.generic]) -> np.ndarray:
    if isinstance(values, np.ndarray | list):
        return np.asarray(values, kind)
    return np.fromiter(values, kind, len(values) if isinstance(values, Sized) else -1)


def _with_room(held: np.ndarray, room: int) -> np.ndarray:
    """A copy with room for more; what is never written of it takes no memory."""
    larger = np.empty(room, held.dtype)
    larger[: len(held)] = held
    return larger
