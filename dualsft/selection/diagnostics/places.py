"""Where in the network weights are, and how many of them are chosen: by layer and kind of module."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from dualsft.allocators.groups import KINDS, place_of

ALL = "all"
"""The kind that stands for a layer's modules of all kinds together."""


class CountedTensor(Protocol):
    """A parameter's name, and how many of its weights there are and are chosen, with the sum of the scores."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def size(self) -> int: ...  # noqa: D102

    @property
    def selected(self) -> int: ...  # noqa: D102

    @property
    def score_sum(self) -> float | None: ...  # noqa: D102


@dataclass(frozen=True)
class PlaceCounts:
    """The weights of one kind of module in one layer.

    Attributes:
        layer: The layer's number; None for weights outside of all layers.
        kind: One of `KINDS`, or `ALL`.
        size: How many weights there are.
        selected: How many are chosen.
        score_sum: The sum of their scores; None where there are none.
    """

    layer: int | None
    kind: str
    size: int
    selected: int
    score_sum: float | None

    @property
    def density(self) -> float:
        """The share of the weights that is chosen."""
        return self.selected / self.size if self.size else 0.0


def by_place(tensors: Iterable[CountedTensor]) -> list[PlaceCounts]:
    """Add up by layer and kind, and by layer alone (`ALL`): layers in order, what is outside of all at the end."""
    found: dict[tuple[int | None, str], tuple[int, int, float | None]] = {}
    for tensor in tensors:
        layer, kind = place_of(tensor.name)
        for key in ((layer, kind), (layer, ALL)):
            size, selected, total = found.get(key, (0, 0, 0.0))
            summed = None if total is None or tensor.score_sum is None else total + tensor.score_sum
            found[key] = size + tensor.size, selected + tensor.selected, summed
    order = (*KINDS, ALL)
    places = [PlaceCounts(layer, kind, *counts) for (layer, kind), counts in found.items()]
    return sorted(places, key=lambda of: (_depth(of.layer), order.index(of.kind)))


def _depth(layer: int | None) -> float:
    return float("inf") if layer is None else layer
