"""A mapping from parameter names to tensors that are made one at a time, so that they never all take memory at once."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor


class LazyTensors(Mapping[str, Tensor]):
    """A read-only mapping of names to tensors; each tensor is made at every read, and none is kept.

    Asking which names there are, in the order given, makes no tensor.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def under(prefix: str, tensors: Mapping[str, Tensor]) -> LazyTensors:
    """The tensors whose names begin with a prefix and a colon, by the rest of their names."""
    begin = f"{prefix}:"
    names = [name.removeprefix(begin) for name in tensors if name.startswith(begin)]
    return LazyTensors(names, lambda name: tensors[begin + name])


def named_under(prefix: str, tensors: Mapping[str, Tensor]) -> LazyTensors:
    """The tensors by names that begin with a prefix and a colon."""
    begin = f"{prefix}:"
    return LazyTensors([begin + name for name in tensors], lambda name: tensors[name.removeprefix(begin)])
