"""A section of the run on a GPU: what it finds out, its time limit, and the function that yields its figures."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import NamedTuple


class Figure(NamedTuple):
    """One measured figure.

    Attributes:
        name: What was measured, of which case.
        value: A number, or a text where there is none.
        unit: Of the number; ``ratio`` has none.
    """

    name: str
    value: float | str
    unit: str = ""


@dataclass(frozen=True)
class Scale:
    """How large a run is.

    Attributes:
        device: ``cuda`` or ``cpu``.
        shapes: Names of the small, the middle and the large model.
        deep: Name of the model whose launches are counted.
        narrow: Name of the model that is compared with plain autograd.
        batch_tokens: Tokens of a batch.
        lengths: Tokens of an example, short and long.
        rounds: How often times are taken.
        examples: How many examples are scored where scores are compared.
        weights: Weights among which some are chosen.
        side: Rows of the matrices that are multiplied.
    """

    device: str
    shapes: tuple[str, str, str]
    deep: str
    narrow: str
    batch_tokens: int
    lengths: tuple[int, int]
    rounds: int
    examples: int
    weights: int
    side: int

    @property
    def cuda(self) -> bool:
        """Whether it runs on a GPU."""
        return self.device == "cuda"


ON_GPU = Scale(
    "cuda",
    ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"),
    "llama-3.2-3b",
    "small",
    batch_tokens=8192,
    lengths=(512, 2048),
    rounds=3,
    examples=128,
    weights=200_000_000,
    side=8192,
)
MINIATURE = Scale(
    "cpu",
    ("tiny", "tiny", "tiny"),
    "tiny",
    "tiny",
    batch_tokens=32,
    lengths=(8, 16),
    rounds=1,
    examples=8,
    weights=100_000,
    side=64,
)


@dataclass(frozen=True)
class Section:
    """One section.

    Attributes:
        what: What it finds out, in a sentence.
        limit: Seconds after which it is stopped.
        function: Module and name of the function that yields the figures, each as soon as it is known.
        miniature: Whether it has a miniature on a CPU that takes a few seconds.
    """

    what: str
    limit: float
    function: str
    miniature: bool = True

    def load(self) -> Callable[[Scale], Iterator[Figure]]:
        """Import the function, with all that it needs."""
        found: Callable[[Scale], Iterator[Figure]] = resolve_name(self.function)
        return found
