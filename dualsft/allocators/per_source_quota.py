"""Splits the budget over the sources of the records, and chooses the highest scores within each."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from dualsft.allocators.apportion import apportion
from dualsft.allocators.base import DataAllocator, ScoredExamples
from dualsft.errors import UserError

_SHOWN = 5


class PerSourceQuota(DataAllocator):
    """A part of the budget for each source, spent on its highest scores; ties to the earlier row.

    A source that is too small for its part is taken in full, and the others share what it leaves, so that exactly the
    budget is chosen. Among equal remainders, the source that occurs first is rounded up.

    Args:
        column: Column of the records that names an example's source; ``source`` is also its name in the pool.
        shares: Parts of the sources: by numbers of examples (proportional), all the same (equal), or proportional to
            numbers in a mapping of sources; a source that the mapping does not name gets a part only if all named ones
            are taken in full.

    Raises:
        UserError: if a share is negative or not finite, or none is positive.
    """

    def __init__(
        self, column: str = "source", shares: Literal["proportional", "equal"] | dict[str, int | float] = "proportional"
    ) -> None:
        if isinstance(shares, dict):
            _check(shares)
        elif shares not in ("proportional", "equal"):
            raise UserError(
                f"per_source_quota shares by 'proportional', 'equal' or a mapping of sources, not by {shares!r}."
            )
        self.column, self.shares = column, shares

    def check(self, records: Mapping[int, Mapping[str, object]]) -> None:
        """Refuse records of which one lacks the column, or none is of a source that has a share."""
        self._shares(Counter(self._source(row, record) for row, record in records.items()))

    def allocate(self, examples: ScoredExamples, budget: int) -> Int[Tensor, " chosen"]:
        """Exactly ``budget`` examples; see `DataAllocator.allocate`.

        Raises:
            UserError: if a record lacks the column, or a source that has a share does not occur.
        """
        sources = [
            self._source(row, record)
            for row, record in zip(examples.example_id.tolist(), examples.records, strict=True)
        ]
        sizes = Counter(sources)
        parts = apportion(budget, self._shares(sizes), list(sizes.values()))
        left = dict(zip(sizes, parts, strict=True))
        chosen = []
        for k in torch.sort(examples.score, descending=True, stable=True).indices.tolist():
            if left[sources[k]]:
                left[sources[k]] -= 1
                chosen.append(k)
        return examples.example_id[sorted(chosen)]

    def _source(self, row: int, record: Mapping[str, object]) -> str:
        if self.column not in record:
            raise UserError(
                f"per_source_quota finds no column {self.column!r} in row {row} of the pool (the record has "
                f"{', '.join(record) or 'none'}); give it the name of one as column."
            )
        return str(record[self.column])

    def _shares(self, sizes: Counter[str]) -> Sequence[int | float]:
        """The numbers that the sources' parts are proportional to."""
        if not isinstance(self.shares, dict):
            return list(sizes.values()) if self.shares == "proportional" else [1] * len(sizes)
        named = {str(source): share for source, share in self.shares.items()}
        if unknown := [source for source in named if source not in sizes]:
            more = f" and {len(sizes) - _SHOWN:,} more" if len(sizes) > _SHOWN else ""
            raise UserError(
                f"per_source_quota gives a share to {unknown[0]!r}, but column {self.column!r} of the pool holds "
                f"{', '.join(map(repr, list(sizes)[:_SHOWN]))}{more}; name one of these."
            )
        return [named.get(source, 0) for source in sizes]


def _check(shares: dict[str, int | float]) -> None:
    for source, share in shares.items():
        if not 0 <= share < float("inf"):
            raise UserError(f"per_source_quota gives {source!r} the share {share}; give 0 or a positive number.")
    if not any(shares.values()):
        raise UserError(f"per_source_quota has no positive share in {shares}; give at least one.")
