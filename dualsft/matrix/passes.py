"""A pass over batches: Σ_i ∇l_i (columns), <u, ∇l_i> of every example (rows), or both in one backward.

The same pass sums squared gradients, and, given another derivative than the first, products with the Hessian
(`curvature.py`); l_i is an example's likelihood unless another loss is given.

Examples that are not finite are left out and reported. A *loss* that is not finite shows before backward, and its
example is left out of the batch. A *gradient* that is not finite shows only when parts of it have been added to the
sums. Then the pass goes on to find all such examples, and is repeated without them: the sums hold no trace of them.

The state of a pass between two batches can be kept; a killed run's pass goes on from there.

Each rank of a sharded model passes over batches of its own (`model_calls.py`). What is found of the examples is
gathered in the end; the sums stay shards.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dualsft.data.layout import Batch, one_example
from dualsft.matrix.interaction import ColumnSums, Direction, RowSums
from dualsft.matrix.model_calls import Derivative, Losses, ModelCalls, suspended
from dualsft.matrix.nonfinite import drop_examples, finite_losses
from dualsft.matrix.pass_result import GradientPass
from dualsft.matrix.placement import requires_grad
from dualsft.matrix.sketches import LOSS, ExampleStatistics, Measurement, sketch_factors
from dualsft.matrix.spot_check import shares_rows, spot_check
from dualsft.models import PreTrainedModel
from dualsft.objectives import example_losses
from dualsft.sharding.collectives import all_reduce_sum, any_rank
from dualsft.sharding.lockstep import CallKind
from dualsft.sharding.shards import compute_device, shard_copy
from dualsft.sharding.unit_gather import UnitGather

Watch = Callable[[Iterable[Batch]], Iterator[Batch]]
"""Iterates over batches for the caller and looks at them on the way: progress, counts."""

Batches = Callable[[int], Iterable[Batch]]
"""The pass's batches from the k-th on."""

State = tuple[dict[str, Tensor], dict[str, Any]]
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
        batches: Gives the batches, the same ones whenever it is called.
        watch: Wraps the iteration, for progress.
        directions: Any number of u, each per trainable parameter; rows are taken for all of them at once.
        columns: Whether to sum the gradients; without, no weight gradient is computed.
        squared: Whether to sum the squares of the gradients' entries instead, with a backward pass for each example.
        by_token: Whether to keep the rows' contributions by token.
        measurement: What else to measure of each example; all but its loss takes a backward pass for each example.
        keeper: Keeps the state of the pass from time to time, and has what an earlier run kept.
        losses: l_i of each example of a batch.
        derivative: What takes the place of a backward pass.
        shards: The parameters of a sharded model, by name, if the model is unsharded during the pass: the ranks' sums
            are added up in the end, and each rank keeps its shards of them.

    Raises:
        UserError: if a batch overflows although each of its examples is finite alone, or a module cannot be scored.
    """
    with ExitStack() as stack:
        # 1. Everything that adds to sums in backward.
        factors = sketch_factors(model, measurement)
        gather = stack.enter_context(UnitGather(model, [*directions, factors]))
        *us, full_factors = gather.full_tensors
        statistics = None
        if measurement.by_example:
            statistics = stack.enter_context(ExampleStatistics(model, measurement, full_factors, drop=not columns))
        column_sums = stack.enter_context(ColumnSums(model, squared)) if columns else None
        row_sums = RowSums(model, us, by_token) if directions else None
        if row_sums:
            stack.enter_context(row_sums)
        if not columns and not statistics:
            stack.enter_context(requires_grad(model.parameters(), False))  # rows need no weight gradients
        calls = ModelCalls(model, column_sums, row_sums, statistics, gather, losses, derivative)
        # 2. The pass, until no gradient is met that is not finite.
        attempt = _Attempt(calls, LOSS in measurement.names)
        if keeper and (kept := keeper.load()):
            attempt.resume(*kept)
        result = attempt.run(batches, watch, keeper)
        while calls.void:
            calls.restart()
            attempt = _Attempt(calls, LOSS in measurement.names, result.nonfinite)
            result = attempt.run(batches, watch, keeper)
        # 3. The sums of ranks that each held the full model.
        if shards:
            result.sums = {name: shard_copy(all_reduce_sum(s), shards[name]) for name, s in result.sums.items()}
        return result


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """The type that activations and their gradients have: the weights', or autocast's where it is on."""
    device = compute_device(model).type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype


class _Attempt:
    """One attempt at a pass: it counts if no gradient is met that is not finite (`ModelCalls.void`).

    Args:
        calls: The model's calls, with the sums.
        keep_losses: Whether each example's loss is part of the result.
        excluded: Ids of the examples that spoilt an earlier attempt.
    """

    def __init__(self, calls: ModelCalls, keep_losses: bool, excluded: Iterable[int] = ()) -> None:
        self._calls, self._keep_losses, self._excluded = calls, keep_losses, frozenset(excluded)
        self._result = GradientPass(calls.columns.sums if calls.columns else {}, nonfinite=set(self._excluded))
        if calls.row_sums is not None:
            self._result.rows = [{} for _ in calls.row_sums.directions]
            self._result.tokens = [{} for _ in calls.row_sums.directions if calls.row_sums.rows.by_token]
        self._done = 0
        self._checked: set[bool] = set()

    def run(self, batches: Batches, watch: Watch, keeper: Keeper | None) -> GradientPass:
        """Go through the batches; each rank through its own, a round of one each at a time."""
        for batch in self._rounds(iter(watch(batches(self._done)))):
            if keeper and any_rank(keeper.due()):
                keeper.save(*self._state())
            for part in self._parts(batch) if batch is not None else ():
                self._score(part)
            self._calls.wait(CallKind.NOTHING)
            self._done += 1
        self._note_covered()
        self._result.share()
        return self._result

    def _rounds(self, batches: Iterator[Batch]) -> Iterator[Batch | None]:
        """This rank's batches, and None for as long as other ranks have some left."""
        while any_rank((batch := next(batches, None)) is not None):
            yield batch

    def _parts(self, batch: Batch) -> list[Batch]:
        """The batch, or each of its examples where every example's own gradient is needed."""
        calls = self._calls
        if not calls.statistics and not (calls.columns and calls.columns.squared):
            return [batch]
        return [one_example(batch, k) for k in range(len(batch["example_id"]))]

    def _score(self, batch: Batch) -> None:
        calls, result = self._calls, self._result
        # 1. Forward, without the examples that spoilt an earlier attempt or whose loss is not finite.
        batch = drop_examples(batch, self._excluded)
        found = finite_losses(batch, calls.forward, calls.has_finite_loss, calls.row_sums is not None)
        result.nonfinite |= found.nonfinite
        if len(found.losses):
            # 2. Backward, which adds to the sums on all ranks.
            calls.backward(found.losses)
            # 3. Count the examples, or find those whose gradient is not finite.
            if any_rank(not calls.finite):
                result.nonfinite |= calls.find_nonfinite(found.batch)
            elif not calls.void:
                self._count(found.batch, found.losses)
        # 4. What its company spoilt is scored by itself.
        for example in found.alone:
            self._score(example)

    def _count(self, batch: Batch, losses: Tensor) -> None:
        ids = batch["example_id"].tolist()
        self._result.counted += len(ids)
        self._measure(ids, losses)
        if self._calls.row_sums is not None:
            self._read_rows(batch, ids, self._calls.row_sums)

    def _measure(self, ids: list[int], losses: Tensor) -> None:
        measured = self._result.measured
        if self._keep_losses:
            measured.setdefault(LOSS, {}).update(zip(ids, losses.detach().double().cpu(), strict=True))
        if self._calls.statistics:
            (example,) = ids
            for name, value in self._calls.statistics.read().items():
                measured.setdefault(name, {})[example] = value

    def _read_rows(self, batch: Batch, ids: list[int], row_sums: RowSums) -> None:
        calls, result, rows = self._calls, self._result, row_sums.rows
        values = rows.read().tolist()
        for of_direction, scores in zip(result.rows, values, strict=True):
            of_direction.update(zip(ids, scores, strict=True))
        lengths = [length for _, _, length in rows.layout.spans]
        for k, contributions in enumerate(result.tokens):
            tokens = rows.read_tokens(k).cpu()
            contributions.update((i, t[:n].clone()) for i, t, n in zip(ids, tokens, lengths, strict=True))
        if (sharing := shares_rows(batch)) not in self._checked:  # the first batch, and the first of shared rows
            self._checked.add(sharing)
            with suspended(calls.statistics, row_sums, calls.columns):
                spot_check(calls.model, row_sums, batch, values, compute_dtype(calls.model), calls.wait_for_probe)

    def _note_covered(self) -> None:
        if self._calls.row_sums:
            self._result.covered |= self._calls.row_sums.rows.covered

    def _state(self) -> State:
        self._note_covered()
        tensors, notes = self._result.state()
        return tensors, {**notes, "done": self._done, "void": self._calls.void, "excluded": sorted(self._excluded)}

    def resume(self, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Go on from the state that an earlier run kept."""
        self._done, self._calls.void, self._excluded = notes["done"], notes["void"], frozenset(notes["excluded"])
        sums = self._result.sums  # the hooks add to these very tensors
        self._result = GradientPass.from_state(tensors, notes)
        for name, kept in self._result.sums.items():
            sums[name].copy_(kept)
        self._result.sums = sums
