"""The calls of a model that a pass makes, and their order among those of other ranks.

All ranks of a sharded model make each call together (`dualsft.sharding.lockstep`), although each has its own batches,
and its own examples to re-examine. Until the kind of call that a rank wants is due on all of them, it takes part in
other ranks' calls with a dummy example, which adds nothing. A single process never waits.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dualsft.data.layout import AmbiguousShapeError, Batch, Layout, to_device
from dualsft.errors import UserError
from dualsft.matrix.interaction import ColumnSums, RowSums
from dualsft.matrix.nonfinite import all_finite, nonfinite_examples
from dualsft.matrix.readout import read_together
from dualsft.matrix.rows import Rows
from dualsft.matrix.sketches import ExampleStatistics
from dualsft.matrix.spot_check import watched_gradients
from dualsft.models import PreTrainedModel
from dualsft.sharding.collectives import any_shard
from dualsft.sharding.lockstep import CallKind, wait_for_turn
from dualsft.sharding.shards import compute_device
from dualsft.sharding.unit_gather import UnitGather

Losses = Callable[[PreTrainedModel, Batch, Layout], Tensor]
"""The loss of each example of a batch, (example)."""

Derivative = Callable[[Tensor], None]
"""Differentiates a scalar loss, so that whatever is to be summed over the batches becomes the parameters' ``grad``."""

SMALLER_BATCHES = "use smaller batches or float32 weights"
"""A remedy (see `UserError`)."""

_DUMMY: Batch = {
    "example_id": torch.tensor([-1]),
    "input_ids": torch.zeros(1, 5, dtype=torch.int64),
    "labels": torch.zeros(1, 5, dtype=torch.int64),
    "attention_mask": torch.ones(1, 5, dtype=torch.int64),
}


@dataclass(frozen=True)
class BatchValues:
    """What a batch gives, on the host.

    Attributes:
        finite: Whether its gradients are finite, by the columns or else by the rows.
        rows: <u, g_i>, (direction, example); one tensor, or none without directions.
        tokens: For each direction, the tokens' contributions, (example, longest); if they are kept.
    """

    finite: bool
    rows: list[Tensor]
    tokens: list[Tensor]


@dataclass(eq=False)
class ModelCalls:
    """The forward and backward calls of a pass, and the sums that backward adds to.

    A forward call is ``losses(model, *begin(batch))``. Sums that are not wanted are None.

    Attributes:
        gather: Makes a sharded model's directions available in backward.
        void: Whether a gradient that is not finite has been added to the sums, which are then invalid.
    """

    model: PreTrainedModel
    columns: ColumnSums | None
    row_sums: RowSums | None
    statistics: ExampleStatistics | None
    gather: UnitGather
    losses: Losses
    derivative: Derivative
    void: bool = False

    @property
    def rows(self) -> Rows | None:
        """The accumulator of the taps, if there are any."""
        return self.row_sums.rows if self.row_sums else None

    def wait(self, kind: CallKind) -> None:
        """Take part in other ranks' calls until calls of this kind are due on all ranks."""
        wait_for_turn(kind, self._take_part)

    def wait_for_probe(self) -> None:
        """Take part in other ranks' calls until gradients of single examples are due on all ranks."""
        self.gather.drop()  # on all ranks, which gather again together
        self.wait(CallKind.PROBE)

    def _take_part(self, kind: CallKind) -> None:
        """Make other ranks' call with the dummy example."""
        if kind == CallKind.EVALUATION:
            self._evaluate(_DUMMY)
        elif kind == CallKind.PROBE:
            self._probe(_DUMMY)
        else:
            losses = self.losses(self.model, *self.begin(_DUMMY))
            if any_shard(False):  # the losses of another rank are not finite: nothing is differentiated
                return
            self.backward(0 * losses)  # weight zero: it adds nothing to sums or rows
            if any_shard(not self.finite):
                self.find_nonfinite(None)  # dummy probes, until the other ranks have found their examples

    def begin(self, batch: Batch) -> tuple[Batch, Layout]:
        """Prepare the taps for a batch; return the batch on the model's device, and its layout."""
        layout = Layout.of(batch)
        self.gather.drop()
        if self.rows is not None:
            self.rows.begin(layout)
        return to_device(batch, compute_device(self.model)), layout

    def is_ambiguous(self) -> bool:
        """Whether, after forward, some output's axes are ambiguous at the batch's width.

        Raises:
            UserError: if an output cannot be split into examples.
        """
        try:
            if self.rows is not None:
                self.rows.check()
        except AmbiguousShapeError:
            return True
        return False

    def backward(self, losses: Tensor) -> None:
        """Differentiate the sum of the losses; gradients, rows and statistics are added up."""
        if self.statistics:
            self.statistics.begin()
        if losses.requires_grad:  # else nothing that is summed or scored took part
            self.derivative(losses.sum())
        self.gather.drop()
        if self.rows is not None:
            self.rows.complete = True

    @property
    def finite(self) -> bool:
        """Whether the last backward was finite, by the columns or else by the rows; for a look at nothing else."""
        return bool(self.columns.finite()) if self.columns else self._has_finite_rows()

    def read(self) -> BatchValues:
        """What the last backward has left on the device, which it waits for once; all outputs must have been tapped."""
        rows = self.rows
        scores = [rows.read()] if rows else []
        tokens = [rows.read_tokens(k) for k in range(len(rows.directions))] if rows and rows.by_token else []
        finite = self.columns.finite() if self.columns else torch.tensor(True)
        if scores:
            finite = finite.to(compute_device(self.model)) if self.columns else scores[0].isfinite().all()
        sound, *found = read_together([finite, *scores, *tokens])
        return BatchValues(bool(sound), found[: len(scores)], found[len(scores) :])

    def _has_finite_rows(self) -> bool:
        """Whether the rows are finite, or unknown: an example alone may have ambiguous axes."""
        return self.rows is None or self.is_ambiguous() or bool(self.rows.read().isfinite().all())

    def has_finite_loss(self, example: Batch) -> bool:
        """Whether the loss of a batch of one example is finite."""
        self.wait(CallKind.EVALUATION)
        return bool(self._evaluate(example).isfinite().all())

    @torch.no_grad()
    def _evaluate(self, batch: Batch) -> Tensor:
        return self.losses(self.model, to_device(batch, compute_device(self.model)), Layout.of(batch))

    def find_nonfinite(self, batch: Batch | None) -> set[int]:
        """The ids of this rank's examples whose gradient is not finite, after a backward that was not.

        The sums become void.

        Raises:
            UserError: if there is no such example on any rank.
        """
        self.void = True
        if self.columns:
            self.columns.reset()
        ids = batch["example_id"].tolist() if batch is not None else []
        found = nonfinite_examples(batch, self._has_finite_gradient, ids) if batch is not None else []
        self.wait(CallKind.NOTHING)
        if not any_shard(bool(found)):
            raise UserError(
                f"The gradients of the examples {ids} overflow {self.model.dtype} when added, though each is finite.",
                SMALLER_BATCHES,
            )
        return set(found)

    def _has_finite_gradient(self, example: Batch) -> bool:
        self.wait_for_probe()
        return self._probe(example)

    def _probe(self, example: Batch) -> bool:
        """Whether the gradient of an example, which is added to no sum, is finite."""
        finite: list[Tensor] = []
        # the same weights on every rank, and as in a spot check, since their gradients are exchanged
        trainable = [name for name, p in self.model.named_parameters() if p.requires_grad]
        names = self.rows.directions[0] if self.rows else trainable
        with (
            suspended(self.statistics, self.columns),
            watched_gradients(self.model, names, lambda _, gradient: finite.append(all_finite(gradient))),
        ):
            self.backward(self.losses(self.model, *self.begin(example)))
        return self._has_finite_rows() and all(map(bool, finite))


@contextmanager
def suspended(*contexts: AbstractContextManager[Any] | None) -> Iterator[None]:
    """Close contexts, whose hooks add to sums, and open them again when this inner context is closed."""
    opened = [context for context in contexts if context is not None]
    with ExitStack() as stack:
        for context in reversed(opened):  # they are opened again from the first to the last
            context.__exit__(None, None, None)
            stack.callback(context.__enter__)
        yield
