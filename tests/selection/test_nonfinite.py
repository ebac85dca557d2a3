"""An example that is not finite is left out alone, whatever shares its row, its batch or its scorer's passes."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dualsft.data.layout import Batch
from dualsft.data.packing import collate_packed
from dualsft.errors import UserError
from dualsft.matrix.passes import gradient_pass
from dualsft.objectives import example_losses
from tests.cases import Example, collate, given, make, make_examples, random_direction
from tests.references import assert_same_gradients, gradient_loop, inner, total
from tests.world.data import LINES, OK, write_jsonl
from tests.world.faults import Kind, PoolAware, poison, poisoned_by
from tests.world.jobs import SGD, Inputs, select

BAD = {"loss": 58, "gradient": 59}
"""The token that each kind of trap is sprung by."""


def examples_with(*kinds: Kind) -> list[Example]:
    """Six examples, of which one has the token of each of these kinds, in its middle."""
    clean = [[7 if i in BAD.values() else i for i in ids] for ids, _ in make_examples((9, 4, 13, 5, 7, 6))]
    for k, kind in zip((2, 4), kinds, strict=False):
        clean[k][3] = BAD[kind]
    return [(ids, [-100, *ids[1:]]) for ids in clean]


def packed(examples: list[Example], rows: list[list[int]]) -> Batch:
    """Rows of examples by their places; an example's id is 100 + its place."""
    named = [{"example_id": 100 + k, "input_ids": ids, "labels": labels} for k, (ids, labels) in enumerate(examples)]
    batch: Any = collate_packed([[named[k] for k in row] for row in rows], 0)
    return batch


WAYS: dict[str, dict[str, Any]] = {
    "rows and columns": {"columns": True},
    "by token": {"columns": True, "by_token": True},
    "rows alone": {"columns": False},
}


@pytest.mark.parametrize("way", [*WAYS, "columns alone"])
@pytest.mark.parametrize("kinds", [("gradient",), ("gradient", "loss")], ids="+".join)
def test_a_packed_row_loses_the_bad_example_alone(kinds: tuple[Kind, ...], way: str) -> None:
    """Its neighbours, which it spoils, are scored as if it were not there."""
    model, examples = make("llama"), examples_with(*kinds)
    u = random_direction(model)
    gradients = gradient_loop(model, examples)  # of a model without traps
    for kind in kinds:
        poison(model, BAD[kind], kind)
    batches = [packed(examples, [[0, 1, 2], [3, 4]]), packed(examples, [[5]])]
    directions = [] if way == "columns alone" else [u]
    found = gradient_pass(model, given(batches), directions=directions, **WAYS.get(way, {}))
    bad = {2, 4} if len(kinds) == 2 else {2}
    assert found.nonfinite == {100 + k for k in bad}
    assert found.counted == 6 - len(bad)
    good = [k for k in range(6) if k not in bad]
    expected = {100 + k: inner(u, gradients[k]) for k in good}
    if directions:
        assert found.rows[0] == {i: pytest.approx(value, rel=1e-6, abs=1e-9) for i, value in expected.items()}
    if way != "rows alone":
        assert_same_gradients(found.sums, total([gradients[k] for k in good]), 1e-9)
    if way == "by token":
        assert {i: math.fsum(values) for i, values in found.tokens[0].items()} == pytest.approx(found.rows[0])
        assert {i: len(values) for i, values in found.tokens[0].items()} == {100 + k: len(examples[k][0]) for k in good}


@pytest.mark.parametrize("kind", BAD)
def test_the_neighbours_are_spoilt_indeed(kind: Kind) -> None:
    """Without the search for the one to blame, attention would lose its neighbours in the row too."""
    model, examples = make("llama"), examples_with(kind)
    poison(model, BAD[kind], kind)
    batch = packed(examples, [[1, 2], [3]])
    losses = example_losses(model, batch)
    if kind == "loss":
        assert losses.isfinite().tolist() == [False, False, True]
        return
    assert losses.isfinite().all()
    (gradient,) = torch.autograd.grad(losses.sum(), [model.model.embed_tokens.weight])
    spoilt = set((~gradient.isfinite()).any(1).nonzero().flatten().tolist())
    assert set(examples[1][0]) <= spoilt


@pytest.mark.parametrize("packing", [False, True])
def test_what_only_its_company_spoils_is_scored_alone(packing: bool) -> None:
    """An example that is finite by itself is not left out for what padding or a neighbour makes of it."""
    model, examples = make("llama"), examples_with()[:3]
    u, gradients = random_direction(model), gradient_loop(model, examples)

    def spoil(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        starts = (kwargs["position_ids"] == 0).sum(1) if packing else 1 + (kwargs["attention_mask"] == 0).sum(1)
        output.logits = output.logits.masked_fill((starts > 1)[:, None, None], torch.nan)
        return output

    model.register_forward_hook(spoil, with_kwargs=True)
    batch = packed(examples, [[0, 1], [2]]) if packing else collate(examples, [100, 101, 102])
    found = gradient_pass(model, given([batch]), directions=[u])
    assert found.rows[0] == pytest.approx({100 + k: inner(u, g) for k, g in enumerate(gradients)}, rel=1e-5)
    assert_same_gradients(found.sums, total(gradients), 2e-6)
    assert (found.counted, found.nonfinite) == (3, set())


@pytest.mark.parametrize("packing", [False, True])
def test_both_passes_of_a_scorer_leave_out_the_same(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    """With a scorer of two passes, all scores are those of the pool without the bad examples, and their sums agree."""
    bad = {0, 9}  # the only ones with these letters
    rest = write_jsonl(tmp_path / "rest.jsonl", [line for i, line in enumerate(LINES) if i not in bad])
    options = {**SGD, "scorer": PoolAware(), "data_budget": 3}
    data = {"packing": packing}
    expected = select(replace(inputs, train=rest), tmp_path / "rest", options, data=data)
    monkeypatch.setattr("tests.world.jobs.SelectionModule", poisoned_by(gradient="4", loss="P"))
    found = select(inputs, tmp_path / "all", options, data=data)
    assert {i for i, s in enumerate(found.examples["status"].to_pylist()) if s == "nonfinite"} == bad
    scores = [[s for s in e.examples["score"].to_pylist() if s is not None] for e in (found, expected)]
    assert len(scores[0]) == len(OK) - len(bad)
    assert scores[0] == pytest.approx(scores[1], rel=1e-4, abs=1e-5 * max(map(abs, scores[1])))
    assert_same_gradients(found.parameter_scores(), expected.parameter_scores(), 1e-5)
    assert [record["prompt"] for record in found.records] == [record["prompt"] for record in expected.records]
    assert found.manifest["sum_identity"]["relative_difference"] < 1e-5
    passed = {phase["name"]: phase["examples"] for phase in found.manifest["phases"]}
    assert passed == {"validation gradient": 2, "pool gradient": 2 * len(OK), "scores": len(OK) - len(bad)}


def test_a_pool_without_a_finite_example_has_no_gradient(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the pool that is named, not the scorer that was to divide by none."""
    pool = write_jsonl(tmp_path / "pool.jsonl", [{"prompt": "Paris", "response": "y"}])
    monkeypatch.setattr("tests.world.jobs.SelectionModule", poisoned_by(loss="P"))
    with pytest.raises(UserError, match=r"No example of data\.train has a finite loss and gradient"):
        select(replace(inputs, train=pool), tmp_path / "out", {**SGD, "scorer": PoolAware()})
