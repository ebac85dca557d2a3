"""Passes over the data: Σ_i ∇l_i (columns), <u, ∇l_i> of every example (rows), or both in one backward.

The same pass sums squared gradients, and, given another derivative than the first, products with the Hessian
(`curvature.py`); l_i is an example's likelihood unless another loss is given.

A pass excludes what is not finite and says so. A non-finite *loss* is seen before backward and its example left out of
the batch. A non-finite *gradient* is seen when parts of it have been folded already, so the pass goes on only to find
every such example, and is then repeated without them: the sums hold no trace of them.

What a pass holds at the start of a batch is all that it needs to go on from there: it can be kept and taken up again.

Of a sharded model each rank passes over batches of its own, and its calls of the model are made with all others'
(`distributed/lockstep.py`); what is found of the examples is shared in the end, the sums stay shards.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dualsft.data.layout import AmbiguousShapeError, Batch, Layout, only, to_device, widen, without
from dualsft.errors import UserError
from dualsft.matrix.interaction import ColumnSums, Direction, RowSums, paused
from dualsft.matrix.pass_result import GradientPass
from dualsft.matrix.sketches import LOSS, ExampleStatistics, Measurement, sketch_factors
from dualsft.matrix.spot_check import shares_rows, spot_check, watched_gradients
from dualsft.objectives import example_losses
from dualsft.sharding.collectives import all_reduce_sum, any_rank
from dualsft.sharding.lockstep import CallKind, wait_for_turn
from dualsft.sharding.shards import compute_device, shard_copy
from dualsft.sharding.unit_gather import UnitGather

Watch = Callable[[Iterable[Batch]], Iterator[Batch]]
"""Something that iterates for the caller and looks at the batches as they pass: progress, counts."""

Batches = Callable[[int], Iterable[Batch]]
"""Gives the pass's batches from the k-th on."""

Losses = Callable[[PreTrainedModel, Batch, Layout], Tensor]
"""The loss of each example of a batch, (example)."""

Derivative = Callable[[Tensor], None]
"""Differentiates a scalar loss, so that whatever is to be summed over the batches becomes the parameters' ``grad``."""


_NOTHING: Batch = {
    "example_id": torch.tensor([-1]),
    "input_ids": torch.zeros(1, 5, dtype=torch.int64),
    "labels": torch.zeros(1, 5, dtype=torch.int64),
    "attention_mask": torch.ones(1, 5, dtype=torch.int64),
}
"""An example to stand in with."""


@runtime_checkable
class Keeper(Protocol):
    """Keeps the state of a pass under way."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What an earlier, killed run kept."""

    def due(self) -> bool:
        """Whether it is time to keep the state again."""

    def save(self, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Keep the state."""


def gradient_pass(
    model: PreTrainedModel,
    batches: Batches,
    watch: Watch = iter,
    directions: Sequence[Direction] = (),
    *,
    columns: bool = True,
    squared: bool = False,
    by_token: bool = False,
    measurement: Measurement = Measurement(),  # noqa: B008 (frozen)
    keeper: Keeper | None = None,
    losses: Losses = example_losses,
    derivative: Derivative = Tensor.backward,
    shards: Mapping[str, Tensor] | None = None,
) -> GradientPass:
    """Sum the gradients of all examples and, given u, take <u, g_i> of each, in one backward pass per batch.

    Args:
        model: The model at the scoring checkpoint, in evaluation mode.
        batches: Batches of examples (see `dualsft.data.layout.Batch`), the same ones whenever it is called.
        watch: Wraps the iteration, for progress.
        directions: Any number of u, each per trainable parameter; rows are taken for all of them at once.
        columns: Whether to sum the gradients; without, no weight gradient is computed.
        squared: Whether to sum the squares of the gradients' entries instead, with a backward pass for each example.
        by_token: Whether to keep the rows' contributions by token.
        measurement: What to measure of each example beside; all but its loss takes a backward pass for each example.
        keeper: Keeps the state of the pass every so often, and has what an earlier run kept.
        losses: l_i of each example of a batch.
        derivative: What takes the place of a backward pass.
        shards: The parameters of a sharded model that has been made whole: its ranks' sums are added up in the end, and
            each keeps its shards of them.

    Raises:
        UserError: if a batch overflows although each of its examples is finite alone, or a module cannot be scored.
    """
    with ExitStack() as stack:
        factors = sketch_factors(model, measurement)
        travelling = stack.enter_context(UnitGather(model, [*directions, factors]))
        *us, whole_factors = travelling.full_tensors
        statistics = None
        if measurement.by_example:
            statistics = stack.enter_context(ExampleStatistics(model, measurement, whole_factors, drop=not columns))
        column_sums = stack.enter_context(ColumnSums(model, squared)) if columns else None
        row_sums = stack.enter_context(RowSums(model, us, by_token)) if directions else None
        if not columns and not statistics:
            stack.enter_context(_frozen(model))
        taken = _Taken(column_sums, row_sums, statistics, LOSS in measurement.names, travelling)
        attempt = _Pass(model, taken, losses, derivative)
        attempt.take_up(keeper.load() if keeper else None)
        while True:
            result = attempt.run(batches, watch, keeper)
            if not attempt.void:
                result.sums = {
                    n: shard_copy(all_reduce_sum(t), shards[n]) if shards else t for n, t in result.sums.items()
                }
                return result
            attempt = attempt.repeat()


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """The type that activations and their gradients have: the weights', or autocast's where it is on."""
    device = compute_device(model).type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype


@dataclass(frozen=True)
class _Taken:
    """What a pass takes from each batch; None for what it does not."""

    columns: ColumnSums | None
    rows: RowSums | None
    statistics: ExampleStatistics | None
    losses: bool
    travelling: UnitGather


class _Pass:
    """One attempt at a pass.

    Attributes:
        void: Whether a non-finite gradient was met, so that the sums are worthless.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        taken: _Taken,
        losses: Losses,
        derivative: Derivative,
        excluded: Iterable[int] = (),
    ) -> None:
        self._model, self._taken, self._losses, self._derivative = model, taken, losses, derivative
        self._columns, self._rows, self._statistics = taken.columns, taken.rows, taken.statistics
        self._excluded = frozenset(excluded)
        self._result = GradientPass(self._columns.sums if self._columns else {}, nonfinite=set(excluded))
        if self._rows is not None:
            self._result.rows = [{} for _ in self._rows.directions]
            self._result.tokens = [{} for _ in self._rows.directions if self._rows.by_token]
        self._done = 0
        self._checked: set[bool] = set()
        self.void = False

    def repeat(self) -> "_Pass":
        """The next attempt, without the examples that spoilt this one."""
        if self._columns:
            self._columns.reset()
        return _Pass(self._model, self._taken, self._losses, self._derivative, self._result.nonfinite)

    def run(self, batches: Batches, watch: Watch, keeper: Keeper | None) -> GradientPass:
        """Go through the batches; each rank through its own, a round of one each at a time."""
        for batch in self._rounds(iter(watch(batches(self._done)))):
            if keeper and any_rank(keeper.due()):
                keeper.save(*self._state())
            for part in self._parts(batch) if batch is not None else ():
                self._score(part)
            self._turn(CallKind.NOTHING)
            self._done += 1
        self._note_covered()
        self._result.share()
        return self._result

    def _rounds(self, batches: Iterator[Batch]) -> Iterator[Batch | None]:
        """This rank's batches, and None for as long as others have some left."""
        while any_rank((batch := next(batches, None)) is not None):
            yield batch

    def _parts(self, batch: Batch) -> list[Batch]:
        """What is differentiated at once: the batch, or each of its examples where its own gradient is looked at."""
        if not self._statistics and not (self._columns and self._columns.squared):
            return [batch]
        return [only(batch, k) for k in range(len(batch["example_id"]))]

    def _score(self, batch: Batch) -> None:
        batch = without(batch, torch.tensor([i not in self._excluded for i in batch["example_id"].tolist()]))
        losses, batch, alone = self._finite_losses(batch)
        if len(losses):
            self._differentiate(losses)
            if any_rank(self._poisoned):
                self._find_nonfinite(batch)
            elif not self.void:
                self._count(batch, losses)
        for example in alone:
            self._score(example)

    def _differentiate(self, losses: Tensor) -> None:
        if self._statistics:
            self._statistics.begin()
        self._backward(losses)

    def _backward(self, losses: Tensor) -> None:
        if losses.requires_grad:  # else nothing that is summed or scored took part
            self._derivative(losses.sum())
        self._taken.travelling.drop()
        if self._rows:
            self._rows.complete()

    def _turn(self, kind: CallKind) -> None:
        wait_for_turn(kind, self._stand_in)

    def _stand_in(self, kind: CallKind) -> None:
        """Take part in another rank's call, with an example that adds nothing."""
        if kind == CallKind.EVALUATION:
            with torch.no_grad():
                self._losses(self._model, to_device(_NOTHING, compute_device(self._model)), Layout.of(_NOTHING))
        elif kind == CallKind.PROBE:
            self._probe(_NOTHING)
        else:
            losses = self._forward(_NOTHING)
            if any_rank(False):  # an example of another rank's is not finite, and nothing is differentiated
                return
            self._differentiate(0 * losses)
            if any_rank(self._poisoned):
                self._find_nonfinite(None)

    def _count(self, batch: Batch, losses: Tensor) -> None:
        ids = batch["example_id"].tolist()
        self._result.counted += len(ids)
        self._measure(ids, losses)
        if self._rows is not None:
            self._take_rows(batch, ids, self._rows)

    def _measure(self, ids: list[int], losses: Tensor) -> None:
        measured = self._result.measured
        if self._taken.losses:
            measured.setdefault(LOSS, {}).update(zip(ids, losses.detach().double().cpu(), strict=True))
        if self._statistics:
            (example,) = ids
            for name, value in self._statistics.read().items():
                measured.setdefault(name, {})[example] = value

    def _take_rows(self, batch: Batch, ids: list[int], rows: RowSums) -> None:
        found, result = rows.read().tolist(), self._result
        for of_direction, values in zip(result.rows, found, strict=True):
            of_direction.update(zip(ids, values, strict=True))
        lengths = [length for _, _, length in rows.layout.spans]
        for k, kept in enumerate(result.tokens):
            tokens = rows.read_tokens(k).cpu()
            kept.update((i, t[:n].clone()) for i, t, n in zip(ids, tokens, lengths, strict=True))
        if (sharing := shares_rows(batch)) not in self._checked:  # the first batch, and the first of shared rows
            self._checked.add(sharing)
            with paused(self._statistics, rows, self._columns):
                spot_check(self._model, rows, batch, found, compute_dtype(self._model), self._turn_to_probe)

    def _finite_losses(self, batch: Batch) -> tuple[Tensor, Batch, list[Batch]]:
        """The batch's losses ready for backward, its examples without the others, and those to be scored alone.

        An example whose loss is not finite by itself is left out. One that only padding, or a neighbour in its row,
        brings to that is scored by itself, unless the batch without the neighbour will do.
        """
        if not len(batch["example_id"]):
            return torch.empty(0), batch, []
        if self._rows is not None and len(batch["input_ids"]) == batch["input_ids"].shape[1]:
            batch = widen(batch)  # rows and tokens could not be told apart
        self._turn(CallKind.STEP)
        losses = self._forward(batch)
        ambiguous = self._is_ambiguous()
        finite = losses.detach().isfinite().cpu()
        sound = bool(finite.all()) and not ambiguous
        if not any_rank(not sound):
            return losses, batch, []
        if ambiguous:
            return self._finite_losses(widen(batch))
        if sound:  # another rank's are not
            return self._finite_losses(batch)
        lasting = torch.tensor([ok or self._is_finite_alone(batch, k) for k, ok in enumerate(finite.tolist())])
        if not bool(lasting.all()):
            self._result.nonfinite.update(batch["example_id"][~lasting].tolist())
            return self._finite_losses(without(batch, lasting))
        alone = [only(batch, k) for k, ok in enumerate(finite.tolist()) if not ok]
        losses, batch, more = self._finite_losses(without(batch, finite))
        return losses, batch, [*alone, *more]

    def _is_ambiguous(self) -> bool:
        """Whether the last forward pass left a doubt, about an output's axes, that a wider batch has not.

        Raises:
            UserError: if an output cannot be split.
        """
        try:
            if self._rows is not None:
                self._rows.check()
        except AmbiguousShapeError:
            return True
        return False

    @torch.no_grad()
    def _is_finite_alone(self, batch: Batch, k: int) -> bool:
        if len(batch["input_ids"]) == 1 and Layout.of(batch).spans == ((0, 0, batch["input_ids"].shape[1]),):
            return False  # it is alone already
        alone = only(batch, k)
        self._turn(CallKind.EVALUATION)
        losses = self._losses(self._model, to_device(alone, compute_device(self._model)), Layout.of(alone))
        return bool(losses.isfinite().all())

    def _forward(self, batch: Batch) -> Tensor:
        layout = Layout.of(batch)
        self._taken.travelling.drop()
        if self._rows is not None:
            self._rows.begin(layout)
        return self._losses(self._model, to_device(batch, compute_device(self._model)), layout)

    def _find_nonfinite(self, batch: Batch | None) -> None:
        """Find which examples of a poisoned batch are to blame; the sums are void from here on.

        Args:
            batch: This rank's, if it has one.
        """
        self.void = True
        if self._columns:
            self._columns.reset()
        ids = batch["example_id"].tolist() if batch is not None else []
        found = {i for k, i in enumerate(ids) if batch is not None and self._is_poison(only(batch, k))}
        self._turn(CallKind.NOTHING)
        if not any_rank(bool(found)):
            raise UserError(
                f"The gradients of the examples {ids} overflow {self._model.dtype} when added, though each is finite; "
                "lower data.batch_tokens or set model.dtype to float32."
            )
        self._result.nonfinite |= found

    def _turn_to_probe(self) -> None:
        self._taken.travelling.drop()  # as all ranks do, which gather again together
        self._turn(CallKind.PROBE)

    def _is_poison(self, example: Batch) -> bool:
        self._turn_to_probe()
        return self._probe(example)

    def _probe(self, example: Batch) -> bool:
        """Whether the gradient of an example, of which nothing is summed, is not finite."""
        finite: list[Tensor] = []

        def look(_: str, gradient: Tensor) -> None:
            finite.append(torch.stack(torch.aminmax(gradient)).isfinite().all())

        # the same weights on every rank, and as in a spot check, since what has a gradient is sent to the others
        names = (
            self._rows.directions[0]
            if self._rows
            else [n for n, p in self._model.named_parameters() if p.requires_grad]
        )
        with paused(self._statistics, self._columns), watched_gradients(self._model, names, look):
            self._backward(self._forward(example))
        return not (self._finite_rows() and all(map(bool, finite)))

    def _finite_rows(self) -> bool:
        """Whether the rows are finite, as far as they can be told: the width of an example alone may leave a doubt."""
        return self._rows is None or self._is_ambiguous() or bool(self._rows.read().isfinite().all())

    @property
    def _poisoned(self) -> bool:
        """Whether the last backward brought something that is not finite; without columns, as far as the rows show."""
        if self._columns:
            return self._columns.poisoned
        return not self._finite_rows()

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self._note_covered()
        tensors, notes = self._result.state()
        return tensors, {**notes, "done": self._done, "void": self.void, "excluded": sorted(self._excluded)}

    def _note_covered(self) -> None:
        if self._rows:
            self._result.covered |= self._rows.covered

    def take_up(self, kept: tuple[dict[str, Tensor], dict[str, Any]] | None) -> None:
        """Go on from the state that an earlier run kept, if there is one."""
        if kept is None:
            return
        tensors, notes = kept
        self._done, self.void, self._excluded = notes["done"], notes["void"], frozenset(notes["excluded"])
        sums = self._result.sums
        self._result = GradientPass.from_state(tensors, notes)
        for name, kept_sum in self._result.sums.items():
            sums[name].copy_(kept_sum)
        self._result.sums = sums


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight gradients while the context is open; backward needs none of them for the rows."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
