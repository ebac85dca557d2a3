"""A pass over a sharded model, each rank with its own batches, gives what it gives on one process."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dualsft.data.layout import Batch, Layout
from dualsft.matrix.pass_result import GradientPass
from dualsft.matrix.passes import gradient_pass
from dualsft.matrix.sketches import LOSS, NORM, PRECONDITIONED_NORM, SKETCH, Measurement
from dualsft.objectives import example_losses
from dualsft.sharding.groups import rank_slice, shard_mesh
from dualsft.sharding.shard_model import shard_model
from dualsft.sharding.shards import full_tensor, shard_of
from dualsft.sharding.unit_gather import UnitGather
from tests.cases import ARCHITECTURES, chunks_of, collate, given, make, make_examples, pack, random_direction
from tests.world.ranks import run_on_ranks

pytestmark = pytest.mark.heavy


def spoilt_losses(model: PreTrainedModel, batch: Batch, layout: Layout) -> Tensor:
    """Those of the examples 1 and 3 are not finite."""
    return torch.where(spoilt(batch), torch.inf, example_losses(model, batch, layout))


def spoilt_gradients(model: PreTrainedModel, batch: Batch, layout: Layout) -> Tensor:
    """Those of the examples 1 and 3 are finite, and their gradients are not."""
    losses = example_losses(model, batch, layout)
    return losses + torch.where(spoilt(batch), (losses - losses.detach()).abs(), 1.0).sqrt() - 1.0


def spoilt(batch: Batch) -> Tensor:
    """Which examples are 1 or 3."""
    return torch.isin(batch["example_id"], torch.tensor([1, 3]))


BATCHES = [
    collate(make_examples()[:2], [0, 1]),
    collate(make_examples()[2:3], [2]),
    collate(make_examples()[3:], [3, 4]),
]


def gathered_pass(architecture: str, batches: list[Batch], seeds: list[int], **options: Any) -> GradientPass:
    """A pass of all ranks over these batches, dealt out, its sums made whole; losses of the larger are in chunks."""
    model = make(architecture)
    directions = [random_direction(model, seed) for seed in seeds]
    shard_model(model, shard_mesh("cpu"))
    shards = dict(model.named_parameters())
    us = [{name: shard_of(u, shards[name]) for name, u in direction.items()} for direction in directions]
    with chunks_of(8):
        found = gradient_pass(model, lambda first: batches[rank_slice()][first:], directions=us, **options)
    found.sums = {name: full_tensor(total, shards[name]) for name, total in found.sums.items()}
    return found


def all_architectures(batches: list[Batch]) -> dict[str, GradientPass]:
    """Passes over every architecture."""
    return {architecture: gathered_pass(architecture, batches, [0]) for architecture in ARCHITECTURES}


CASES: dict[str, tuple[list[Batch], list[int], dict[str, Any]]] = {
    "rows alone": (BATCHES, [0], {"columns": False}),
    "rows by token": (BATCHES, [0], {"by_token": True}),
    "columns alone": (BATCHES, [], {}),
    "squares": (BATCHES, [], {"squared": True}),
    "on the host": (BATCHES, [0], {"sums_on_host": True, "losses": spoilt_gradients}),
    "squares on the host": (BATCHES, [], {"sums_on_host": True, "squared": True}),
    "two directions": (BATCHES, [0, 1], {}),
    "packed": ([pack([[0, 1], [2]], make_examples()), pack([[3, 4]], make_examples())], [0], {}),
    "one batch": (BATCHES[:1], [0], {}),
    "measured": (BATCHES, [0], {"measurement": Measurement([LOSS, NORM, PRECONDITIONED_NORM, SKETCH])}),
    "measured without sums": (BATCHES, [0], {"columns": False, "measurement": Measurement([NORM, SKETCH])}),
    "square batches": ([collate(make_examples([4, 4, 4, 4])), collate(make_examples([3, 3, 3]), [4, 5, 6])], [0], {}),
    "infinite loss": (BATCHES, [0], {"losses": spoilt_losses}),
    "infinite gradient": (BATCHES, [0], {"losses": spoilt_gradients}),
    "infinite gradient, rows alone": (BATCHES, [0], {"losses": spoilt_gradients, "columns": False}),
}


def all_cases() -> dict[str, GradientPass]:
    """Passes over a Llama."""
    return {
        name: gathered_pass("llama", batches, seeds, **options) for name, (batches, seeds, options) in CASES.items()
    }


@cache
def passes_alone() -> dict[str, GradientPass]:
    """The same passes on one process."""
    found = {}
    for name, (batches, seeds, options) in CASES.items():
        us = [random_direction(make("llama"), seed) for seed in seeds]
        found[name] = gradient_pass(make("llama"), given(batches), directions=us, **options)
    return found


def assert_same(found: GradientPass, expected: GradientPass, relative: float) -> None:
    """Two passes found the same, but for rounding."""
    assert found.counted == expected.counted
    assert found.nonfinite == expected.nonfinite
    assert found.covered == expected.covered
    assert_near(found.sums, expected.sums, relative)
    for kind in ("rows", "tokens"):
        for values, right in zip(getattr(found, kind), getattr(expected, kind), strict=True):
            assert_near(as_tensors(values), as_tensors(right), 10 * relative)
    assert found.measured.keys() == expected.measured.keys()
    for name, values in expected.measured.items():
        least = 1e-6 if name == SKETCH else 0
        assert_near(as_tensors(found.measured[name]), as_tensors(values), max(relative, least))


def as_tensors(values: Mapping[int, Any]) -> dict[int, Tensor]:
    """The same, of numbers or tensors."""
    return {i: torch.as_tensor(value, dtype=torch.float64) for i, value in values.items()}


def assert_near(found: Mapping[Any, Tensor], expected: Mapping[Any, Tensor], relative: float) -> None:
    """The same keys, and values that differ by no more than this share of the largest."""
    assert found.keys() == expected.keys()
    for key, right in expected.items():
        size = max(float(right.abs().max()), 1e-3)
        torch.testing.assert_close(found[key], right, rtol=0, atol=relative * size, msg=partial("{}: {}".format, key))


def test_rows_and_columns_are_those_of_one_process() -> None:
    """On every architecture; the ranks agree."""
    answers = run_on_ranks(2, all_architectures, BATCHES)
    for architecture, found in answers[0].items():
        u = random_direction(make(architecture), 0)
        expected = gradient_pass(make(architecture), given(BATCHES), directions=[u])
        assert_same(found, expected, 1e-5)
    assert all(found.rows == answers[0][name].rows for answer in answers for name, found in answer.items())


def test_whatever_a_pass_does_it_does_on_ranks() -> None:
    """Kinds of passes and of statistics, with fewer batches than ranks, and examples that are not finite; float64."""
    expected = passes_alone()
    for name, found in run_on_ranks(2, all_cases)[0].items():
        assert_same(found, expected[name], 1e-9)


def gathers_by_backward() -> list[list[str]]:
    """What is gathered, and when backward comes to which unit, batch by batch."""
    model, seen = make("llama"), list[list[str]]()
    u = random_direction(model)
    shard_model(model, shard_mesh("cpu"))
    names = {unit: path or "root" for path, unit in model.named_modules()}
    begin, gather = UnitGather._begin, UnitGather._gather

    def noted_begin(self: UnitGather, unit: Any) -> Any:
        seen[-1].append(f"begin {names[unit]}")
        return begin(self, unit)

    def noted_gather(self: UnitGather, unit: Any) -> None:
        seen[-1].append(f"at {names[unit]}")
        gather(self, unit)

    def watch(batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            seen.append([])
            yield batch

    with mock.patch.multiple(UnitGather, _begin=noted_begin, _gather=noted_gather):
        gradient_pass(model, given(BATCHES), watch, [u])
    return seen


def test_a_unit_is_gathered_while_backward_is_in_the_one_before() -> None:
    """From the second batch on, when the order of the units is known."""
    (found,) = run_on_ranks(1, gathers_by_backward)
    first, second = "model.layers.1", "model.layers.0"
    assert found[0][:2] == ["at root", "begin root"]
    assert found[-1] == ["at root", "begin root", f"begin {first}", f"at {first}", f"begin {second}", f"at {second}"]
