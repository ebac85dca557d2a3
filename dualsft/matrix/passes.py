"""A pass over batches: Σ_i ∇l_i (columns), <u, ∇l_i> of every example (rows), or both in one backward.

The same pass sums squared gradients, and, given another derivative than the first, products with the Hessian
(`curvature.py`); l_i is an example's likelihood unless another loss is given.

Examples that are not finite are left out and reported. A *loss* that is not finite shows before backward. A *gradient*
that is not finite shows only when parts of it have been added to the sums: the pass goes on to find all such examples,
and is repeated without them.

A killed run's pass resumes from the state that was kept between two batches. Each rank of a sharded model passes over
batches of its own (`model_calls.py`); the examples' results are gathered in the end, and the sums stay shards. Replicas
of a model, full or sharded, need nothing of each other until then: their sums are added up once, when all have passed
over their batches.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dualsft.data.layout import Batch, one_example
from dualsft.errors import advising
from dualsft.matrix.example_values import ExampleValues
from dualsft.matrix.interaction import ColumnSums, Direction, RowSums
from dualsft.matrix.model_calls import BatchValues, Derivative, Losses, ModelCalls, suspended
from dualsft.matrix.nonfinite import FiniteLosses, drop_examples
from dualsft.matrix.pass_result import GradientPass
from dualsft.matrix.placement import requires_grad
from dualsft.matrix.rows import Rows
from dualsft.matrix.sketches import LOSS, ExampleStatistics, Measurement, sketch_factors
from dualsft.matrix.spot_check import spot_check
from dualsft.models import PreTrainedModel
from dualsft.objectives import example_losses
from dualsft.sharding.collectives import add_up_replicas, any_shard, sum_of_shards
from dualsft.sharding.lockstep import CallKind
from dualsft.sharding.shards import compute_device, shard_copy
from dualsft.sharding.unit_gather import UnitGather
from dualsft.training.compilation import uncompiled

Watch = Callable[[Iterable[Batch]], Iterator[Batch]]
"""Iterates over batches for the caller and looks at them on the way: progress, counts."""

Batches = Callable[[int], Iterable[Batch]]
"""The pass's batches from the k-th on."""

State = tuple[Mapping[str, Tensor], dict[str, Any]]
"""Named tensors, and notes that JSON can hold."""


@runtime_checkable
class Keeper(Protocol):
    """Keeps the state of a pass under way."""

    def load(self) -> State | None:
        """The state that an earlier, killed run kept."""

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
    sums_on_host: bool = False,
    by_token: bool = False,
    measurement: Measurement = Measurement(),  # noqa: B008 (frozen)
    keeper: Keeper | None = None,
    losses: Losses = example_losses,
    derivative: Derivative = Tensor.backward,
    shards: Mapping[str, Tensor] | None = None,
) -> GradientPass:
    """Sum the gradients of all examples and, given u, compute <u, g_i> of each, in one backward pass per batch.

    Args:
        model: The model at the scoring checkpoint, in evaluation mode.
        batches: Returns the batches, the same ones at each call.
        watch: Wraps the iteration, for progress.
        directions: Any number of u, each per trainable parameter; one pass takes the rows for all of them.
        columns: Whether to sum the gradients; without, no weight gradient is computed.
        squared: Whether to sum the squares of the gradients' entries instead, with a backward pass for each example.
        sums_on_host: Whether the sums are held on the host, to which gradients go as soon as they are complete.
        by_token: Whether to keep the rows' contributions by token.
        measurement: Statistics to measure of each example; all but its loss take a backward pass for each example.
        keeper: Saves the state of the pass from time to time, and loads the state of an earlier run.
        losses: l_i of each example of a batch.
        derivative: Replaces the backward pass.
        shards: The parameters of a sharded model, by name, if the model is unsharded during the pass: the ranks' sums
            are added up in the end, and each rank keeps its shards of them.

    Raises:
        UserError: if a batch overflows although each of its examples is finite alone, or a module cannot be scored.
    """
    with ExitStack() as stack:
        if directions or derivative is not Tensor.backward:
            stack.enter_context(uncompiled(model))
        # 1. Everything that adds to sums in backward.
        factors = sketch_factors(model, measurement)
        gather = stack.enter_context(UnitGather(model, [*directions, factors]))
        *us, full_factors = gather.full_tensors
        statistics = None
        if set(measurement.names) - {LOSS}:  # each example's own gradient
            statistics = stack.enter_context(ExampleStatistics(model, measurement, full_factors, drop=not columns))
        column_sums = stack.enter_context(ColumnSums(model, squared, sums_on_host)) if columns else None
        row_sums = RowSums(model, us, by_token) if directions else None
        if row_sums:
            stack.enter_context(row_sums)
        if not columns and not statistics:
            stack.enter_context(requires_grad(model.parameters(), False))  # rows need no weight gradients
        calls = ModelCalls(model, column_sums, row_sums, statistics, gather, losses, derivative)
        # 2. Forward, backward and counting, batch by batch.
        scoring = _Pass(calls, LOSS in measurement.names)
        if keeper and (kept := keeper.load()):
            scoring.resume(*kept)
            del kept  # an open file would stay on the disk when another replaces it
        for batch in scoring.batches(batches, watch, keeper):
            scoring.score(batch)
        # 3. What the ranks have found together, and the sums of those that each held the full model.
        result = scoring.result
        if column_sums:
            column_sums.complete()
            column_sums.check()
        with advising("when the ranks gathered what they had found", "run fewer of them on a host"):
            result.share()
            add_up_replicas(result.sums.values())
        if shards:
            result.sums = {name: shard_copy(sum_of_shards(s), shards[name]) for name, s in result.sums.items()}
        return result


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """The type that activations and their gradients have: the weights', or autocast's where it is on."""
    device = compute_device(model).type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype


class _Pass:
    """Scores batches; starts over if a gradient turns out not to be finite (`ModelCalls.void`)."""

    def __init__(self, calls: ModelCalls, keep_losses: bool) -> None:
        self._calls, self._keep_losses = calls, keep_losses
        self._begin(frozenset())

    def _begin(self, excluded: frozenset[int]) -> None:
        """Start (over), without the examples that spoilt an earlier attempt."""
        calls, self._excluded = self._calls, excluded
        calls.void, self._done = False, 0
        self.result = GradientPass(calls.columns.sums if calls.columns else {}, nonfinite=set(excluded))
        if calls.rows:
            self.result.rows = [ExampleValues() for _ in calls.rows.directions]
            self.result.tokens = [{} for _ in calls.rows.directions if calls.rows.by_token]
        self._checked: set[bool] = set()

    def batches(self, batches: Batches, watch: Watch, keeper: Keeper | None) -> Iterator[Batch]:
        """This rank's batches, or single examples where each one's gradient is needed; again if some is not finite."""
        calls = self._calls
        single = calls.statistics or (calls.columns and calls.columns.squared)
        while True:
            own = iter(watch(batches(self._done)))
            while any_shard((batch := next(own, None)) is not None):  # None for as long as other ranks have some left
                if keeper and any_shard(keeper.due()):
                    if calls.columns:
                        calls.columns.complete()
                    tensors, notes = self.result.state()
                    attempt = {"done": self._done, "void": calls.void, "excluded": sorted(self._excluded)}
                    keeper.save(tensors, {**notes, **attempt})
                if batch is not None and single:
                    yield from (one_example(batch, k) for k in range(len(batch["example_id"])))
                elif batch is not None:
                    yield batch
                calls.wait(CallKind.NOTHING)
                self._done += 1
                if calls.rows:
                    self.result.covered |= calls.rows.covered
            if not calls.void:
                return
            if calls.columns:
                calls.columns.reset()
            self._begin(frozenset(self.result.nonfinite))

    def score(self, batch: Batch) -> None:
        """Add a batch to the sums, and its rows and measurements to the result."""
        calls, result = self._calls, self.result
        # 1. Forward, without the examples that spoilt an earlier attempt or whose loss is not finite.
        found = FiniteLosses(drop_examples(batch, self._excluded), calls.has_finite_loss, calls.rows is not None)
        while found.pending:
            calls.wait(CallKind.STEP)
            losses = calls.losses(calls.model, *calls.begin(found.batch))
            found.inspect(None if calls.is_ambiguous() else losses)
            del losses  # with its graph, before another forward pass
        result.nonfinite |= found.nonfinite
        if found.losses is not None:
            # 2. Backward, which adds to the sums on all ranks.
            calls.backward(found.losses)
            # 3. Count the examples, or find those whose gradient is not finite.
            values = calls.read()
            if any_shard(not values.finite):
                result.nonfinite |= calls.find_nonfinite(found.batch)
            elif not calls.void:
                self._count(found.batch, found.values, values)
        # 4. Score alone each example that only its batch spoilt.
        for example in found.alone:
            self.score(example)

    def _count(self, batch: Batch, losses: Tensor, values: BatchValues) -> None:
        ids = batch["example_id"].tolist()
        self.result.counted += len(ids)
        if self._keep_losses:
            self.result.measure(LOSS, ids, losses)
        if self._calls.statistics:  # batches of one example
            for name, value in self._calls.statistics.read().items():
                self.result.measure(name, ids, value[None])
        if self._calls.rows:
            self._keep_rows(batch, ids, self._calls.rows, values)

    def _keep_rows(self, batch: Batch, ids: list[int], rows: Rows, values: BatchValues) -> None:
        calls, result = self._calls, self.result
        scores = values.rows[0].tolist()
        for of_direction, found in zip(result.rows, scores, strict=True):
            of_direction.add(ids, found)
        lengths = [length for _, _, length in rows.layout.spans]
        for contributions, tokens in zip(result.tokens, values.tokens, strict=True):
            contributions.update((i, t[:n].clone()) for i, t, n in zip(ids, tokens, lengths, strict=True))
        packed = any(first for _, first, _ in rows.layout.spans)
        if packed not in self._checked:  # the first batch, and the first in which examples share a row
            self._checked.add(packed)
            with suspended(calls.statistics, calls.row_sums, calls.columns):
                spot_check(calls.model, rows, batch, scores, compute_dtype(calls.model), calls.wait_for_probe)

    def resume(self, tensors: Mapping[str, Tensor], notes: dict[str, Any]) -> None:
        """Resume from the state that an earlier run kept."""
        self._done, self._calls.void, self._excluded = notes["done"], notes["void"], frozenset(notes["excluded"])
        sums = self.result.sums  # the hooks add to these very tensors
        self.result = GradientPass.from_state(tensors, notes)
        for name, kept in self.result.sums.items():
            sums[name].copy_(kept)
        self.result.sums = sums
