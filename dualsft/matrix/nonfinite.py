"""Finds the examples that spoilt a batch: those whose loss or gradient is not finite by itself.

Losses and gradients that are not finite do not show which example is to blame: in a packed row one example's NaN
spreads to its neighbours, and gradients are sums over the batch. So the suspects are inspected one by one.
"""

from collections.abc import Callable, Collection

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dualsft.data.layout import Batch, Layout, keep_examples, one_example, widen
from dualsft.sharding.collectives import any_shard


def all_finite(values: Tensor) -> Bool[Tensor, ""]:
    """Whether all entries (at least one) are finite; makes no copy, and does not wait for the device."""
    return torch.stack(torch.aminmax(values)).isfinite().all()  # both are NaN if any entry is


def nonfinite_examples(batch: Batch, is_finite: Callable[[Batch], bool], suspects: Collection[int]) -> list[int]:
    """The ids of the suspects that are not finite alone, in the order of the batch."""
    ids = batch["example_id"].tolist()
    return [i for k, i in enumerate(ids) if i in suspects and not is_finite(one_example(batch, k))]


def drop_examples(batch: Batch, ids: Collection[int]) -> Batch:
    """The batch without the examples of these ids."""
    return keep_examples(batch, torch.tensor([i not in ids for i in batch["example_id"].tolist()], dtype=torch.bool))


class FiniteLosses:
    """The losses of a batch without the examples that are not finite.

    Use: ``while found.pending: found.inspect(forward(found.batch))``. Forward is repeated until nothing is left to
    set aside on any rank: a rank whose losses are finite repeats it too, as all ranks of a sharded model differentiate
    together.

    Args:
        batch: Padded or packed.
        is_finite: Whether the loss of a batch of one example is finite.
        has_rows: Whether outputs are split into examples, so that a batch must not have as many rows as tokens.

    Attributes:
        losses: l_i of each example of the batch, all finite; None while pending, and if no example is left.
        values: The same on the host, in float64.
        batch: The batch of the next forward pass, and in the end that of the losses.
        alone: Examples that only padding or neighbours spoil: each must be differentiated as its own batch.
        nonfinite: Ids of the examples whose loss is not finite.
    """

    def __init__(self, batch: Batch, is_finite: Callable[[Batch], bool], has_rows: bool) -> None:
        self._is_finite, self._has_rows = is_finite, has_rows
        self.batch = self._not_square(batch)
        self.losses: Float[Tensor, " example"] | None = None
        self.values = torch.empty(0, dtype=torch.float64)
        self.alone: list[Batch] = []
        self.nonfinite: set[int] = set()

    @property
    def pending(self) -> bool:
        """Whether another forward pass is needed."""
        return self.losses is None and len(self.batch["example_id"]) > 0

    def inspect(self, losses: Tensor | None) -> None:
        """Take the losses of the batch if they are finite, or prepare the batch of the next forward pass.

        Args:
            losses: The losses; None if some output's axes are ambiguous at the batch's width.
        """
        values = self.values if losses is None else losses.detach().double().cpu()
        finite = values.isfinite()
        sound = losses is not None and bool(finite.all())
        # 1. A forward pass counts only if it is sound on each rank.
        if not any_shard(not sound):
            self.losses, self.values = losses, values
        # 2. In a wider batch it will be.
        elif losses is None:
            self.batch = self._not_square(widen(self.batch))
        elif not sound:
            self.batch = self._not_square(self._without_spoilt(finite))

    def _without_spoilt(self, finite: Bool[Tensor, " example"]) -> Batch:
        suspects = set(self.batch["example_id"][~finite].tolist())
        # 3. Leave out the examples that are not finite alone, and see whether the others are now.
        width = self.batch["input_ids"].shape[1]
        alone = len(self.batch["input_ids"]) == 1 and Layout.of(self.batch).spans == (
            (0, 0, width),
        )  # inspected already
        if bad := suspects if alone else set(nonfinite_examples(self.batch, self._is_finite, suspects)):
            self.nonfinite |= bad
            return drop_examples(self.batch, bad)
        # 4. No example is to blame by itself: set the spoilt ones aside, each as a batch of its own.
        self.alone += [one_example(self.batch, k) for k, ok in enumerate(finite.tolist()) if not ok]
        return keep_examples(self.batch, finite)

    def _not_square(self, batch: Batch) -> Batch:
        square = len(batch["input_ids"]) == batch["input_ids"].shape[1]
        return widen(batch) if self._has_rows and square else batch
