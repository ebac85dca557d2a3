"""Which examples share a batch, for very many batches: three arrays, not a list each."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int


class BatchPlan(Sequence[Any]):
    """Batches of examples' ids, each a list made when it is asked for.

    Args:
        order: The ids of all batches, end to end.
        sizes: How many ids each batch has.
        chosen: Which of these batches are meant, in which order; all of them by default.
    """

    def __init__(
        self,
        order: Int[np.ndarray, " slot"],
        sizes: Int[np.ndarray, " batch"],
        chosen: Int[np.ndarray, "taken"] | None = None,
    ) -> None:
        self._order, self._sizes, self._ends = order, sizes, np.cumsum(sizes)
        self._chosen = np.arange(len(sizes)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return self.taken(self._chosen[place])
        batch = self._chosen[place]
        return self._order[self._ends[batch] - self._sizes[batch] : self._ends[batch]].tolist()

    def taken(self, chosen: Int[np.ndarray, " other"]) -> "BatchPlan":
        """The batches of these numbers in `order`, in their order."""
        return BatchPlan(self._order, self._sizes, chosen)
