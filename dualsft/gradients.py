"""Passes over the data: Σ_i ∇l_i (columns) and, with a direction, <u, ∇l_i> (rows) of every example, in one backward.

A pass excludes what is not finite and says so. A non-finite *loss* is seen before backward and its example left out of
the batch. A non-finite *gradient* is seen when parts of it have been folded already, so the pass goes on only to find
every such example, and is then repeated without them: the sums hold no trace of them.
"""

from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dualsft.errors import UserError
from dualsft.interaction import ColumnSums, Direction, RowSums
from dualsft.objective import Batch, example_losses

Watch = Callable[[Iterable[Batch]], Iterator[Batch]]
"""Something that iterates for the caller and looks at the batches as they pass: progress, counts."""


@dataclass
class GradientPass:
    """What one pass over some examples gave.

    Attributes:
        sums: Parameter name -> Σ_i g_i over the counted examples.
        rows: Example id -> <u, g_i>; empty when no direction was given.
        counted: How many examples the sums hold.
        nonfinite: Ids of the examples whose loss or gradient is not finite; in neither sums nor rows.
        coverage: Share of the model's weights that the rows cover.
    """

    sums: dict[str, Tensor]
    rows: dict[int, float] = field(default_factory=dict)
    counted: int = 0
    nonfinite: set[int] = field(default_factory=set)
    coverage: float = 0.0


def gradient_pass(
    model: PreTrainedModel, batches: Iterable[Batch], watch: Watch = iter, direction: Direction | None = None
) -> GradientPass:
    """Sum the gradients of all examples and, given u, take <u, g_i> of each, in one backward pass per batch.

    Args:
        model: The model at the scoring checkpoint, in evaluation mode.
        batches: Re-iterable batches of examples (see `dualsft.objective.Batch`).
        watch: Wraps the iteration, for progress.
        direction: u per trainable parameter; None skips the rows.

    Raises:
        UserError: if a batch overflows although each of its examples is finite alone, or a module cannot be scored.
    """
    excluded: set[int] = set()
    with ColumnSums(model) as columns, RowSums(model, direction) if direction else nullcontext() as rows:
        while True:
            attempt = _Pass(model, columns, rows, excluded)
            result = attempt.run(batches, watch)
            if not attempt.void:
                break
            excluded = result.nonfinite
            columns.reset()
        if rows is not None:
            result.coverage = rows.check_covered(columns.sums)
    return result


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """The type that activations and their gradients have: the weights', or autocast's where it is on."""
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype


class _Pass:
    """One attempt at a pass.

    Attributes:
        void: Whether a non-finite gradient was met, so that the sums are worthless.
    """

    def __init__(
        self, model: PreTrainedModel, columns: ColumnSums, rows: RowSums | None, excluded: Iterable[int]
    ) -> None:
        self._model, self._columns, self._rows = model, columns, rows
        self._excluded = frozenset(excluded)
        self._result = GradientPass(columns.sums, nonfinite=set(excluded))
        self.void = False

    def run(self, batches: Iterable[Batch], watch: Watch) -> GradientPass:
        for batch in watch(batches):
            self._score(_without({k: v.to(self._model.device) for k, v in batch.items()}, self._excluded))
        return self._result

    def _score(self, batch: Batch) -> None:
        losses, batch = self._finite_losses(batch)
        if not len(losses):
            return
        losses.sum().backward()
        if self._columns.poisoned:
            self._find_nonfinite(batch)
            return
        ids = batch["example_id"].tolist()
        self._result.counted += len(ids)
        if self._rows is not None:
            self._result.rows.update(zip(ids, self._rows.read().tolist(), strict=True))

    def _finite_losses(self, batch: Batch) -> tuple[Tensor, Batch]:
        """The batch's losses ready for backward, without the examples whose loss is not finite."""
        losses = self._forward(batch)
        finite = losses.isfinite()
        if bool(finite.all()):
            return losses, batch
        self._result.nonfinite.update(batch["example_id"][~finite].tolist())
        return self._finite_losses({k: v[finite] for k, v in batch.items()})

    def _forward(self, batch: Batch) -> Tensor:
        if not len(batch["input_ids"]):
            return torch.empty(0)
        if self._rows is not None:
            self._rows.begin(*batch["input_ids"].shape)
        return example_losses(self._model, batch)

    def _find_nonfinite(self, batch: Batch) -> None:
        """Find which examples of a poisoned batch are to blame; the sums are void from here on."""
        self.void = True
        found = set()
        for k, example in enumerate(batch["example_id"].tolist()):
            self._columns.reset()
            self._forward({name: values[k : k + 1] for name, values in batch.items()}).sum().backward()
            if self._columns.poisoned:
                found.add(example)
        self._columns.reset()
        if not found:
            raise UserError(
                f"The gradients of the examples {batch['example_id'].tolist()} overflow {self._model.dtype} when "
                "added, though each is finite; lower data.batch_tokens or set model.dtype to float32."
            )
        self._result.nonfinite |= found


def _without(batch: Batch, excluded: Set[int]) -> Batch:
    keep = torch.tensor([i not in excluded for i in batch["example_id"].tolist()], device=batch["input_ids"].device)
    return batch if bool(keep.all()) else {name: values[keep] for name, values in batch.items()}
