"""Choices through a real selection: what is asked for is given, budgets hold in their unit, and patterns leave out."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dualsft import DataAllocator, ParameterAllocator, ScoredExamples, ScoredParameters
from dualsft.allocators import Diverse, GlobalTopK, LayerQuota, PositiveOnly, TokenBudget, TopK
from dualsft.errors import UserError
from dualsft.models.loading import load_model
from dualsft.selection.near_duplicates import NearDuplicates
from dualsft.selection.reallocation import reallocate
from dualsft.selection.summary import summary
from tests.world.data import OK
from tests.world.jobs import ADAM, SGD, Inputs, contents, select


class Curious(DataAllocator):
    """Keeps what it is given."""

    needs = ("loss", "gradient_norm", "preconditioned_gradient_norm", "sketch")
    seen: ScoredExamples

    def allocate(self, examples: ScoredExamples, budget: int) -> torch.Tensor:
        """The first ones."""
        Curious.seen = examples
        return examples.example_id[:budget]


class Heaviest(ParameterAllocator):
    """The largest base weights."""

    needs = ("weight",)

    def allocate(self, scores: ScoredParameters, budget: int) -> dict[str, torch.Tensor]:
        """Top-k by |θ|."""
        assert scores.weight is not None
        return GlobalTopK().allocate({name: scores.weight[name] for name in scores}, budget)


def test_what_is_asked_for_is_kept_and_given(inputs: Inputs, tmp_path: Path) -> None:
    """Numbers are columns, sketches a file, and another allocation from them is the one that a selection makes."""
    made = select(inputs, tmp_path / "out", {**ADAM, "data_allocator": Curious(), "data_budget": 2}, config="a: 1\n")
    assert made.example_ids == OK[:2]
    first = Curious.seen
    assert first.sketch is not None
    assert (len(first.sketch), first.sketch.dtype) == (len(OK), torch.float32)
    table = made.examples.to_pydict()
    for name in ("loss", "gradient_norm", "preconditioned_gradient_norm"):
        given = getattr(first, name)
        assert [table[name][i] for i in OK] == given.tolist()
        assert bool((given > 0).all())
    options: dict[str, Any] = {"parameter_budget": 0.1, "parameter_allocator": GlobalTopK()}
    reallocate(made.folder, tmp_path / "again", data_budget=3, data_allocator=Curious(), **options)
    assert torch.equal(Curious.seen.sketch, first.sketch)  # type: ignore[arg-type]
    again = reallocate(made.folder, tmp_path / "d", data_budget=3, data_allocator=Diverse(), **options)
    direct = select(inputs, tmp_path / "direct", {**ADAM, "data_allocator": Diverse(), "data_budget": 3})
    assert again.example_ids == direct.example_ids
    plain = select(inputs, tmp_path / "plain", {**ADAM, "data_budget": 3})
    assert plain.examples.column_names == ["example_id", "score", "num_tokens", "status", "selected"]
    with pytest.raises(UserError, match=r"Diverse needs the sketch of each example, which .* does not hold"):
        reallocate(plain.folder, tmp_path / "no", data_budget=3, data_allocator=Diverse(), **options)


@pytest.mark.parametrize("order", ["both", "data_then_parameters"])
def test_scores_are_the_same_whatever_is_measured(inputs: Inputs, tmp_path: Path, order: str) -> None:
    """Measuring takes one example at a time, which changes neither side's scores beyond rounding."""
    runs = [
        select(inputs, tmp_path / type(a).__name__, {**SGD, "order": order, "data_budget": 3, "data_allocator": a})
        for a in (TopK(), Curious())
    ]
    left, right = (torch.tensor([s for s in run.examples["score"].to_pylist() if s is not None]) for run in runs)
    assert torch.allclose(left, right, rtol=1e-4, atol=1e-6 * float(left.abs().max()))


def test_allocators_see_the_base_weights(inputs: Inputs, tmp_path: Path) -> None:
    """Those that a fine-tune starts from, whatever the warm-up has done; in `allocate` as well."""
    made = select(inputs, tmp_path / "out", {**ADAM, "parameter_allocator": Heaviest(), "parameter_budget": 99})
    base = {name: p.detach() for name, p in load_model(inputs.model).named_parameters()}
    due = GlobalTopK().allocate(base, 99)
    other = select(inputs, tmp_path / "other", {**ADAM, "parameter_budget": 99})
    again = reallocate(
        other.folder,
        tmp_path / "again",
        parameter_budget=99,
        data_budget=0.1,
        parameter_allocator=Heaviest(),
        data_allocator=TopK(),
    )
    for mask in (made.mask(), again.mask()):
        assert all(torch.equal(mask[name], chosen) for name, chosen in due.items())


def test_parameters_can_be_left_out(inputs: Inputs, tmp_path: Path) -> None:
    """Patterns decide who may be chosen; all are scored, the budget is a share of the rest, in `allocate` as well."""
    patterns: dict[str, Any] = {"trainable": ["layers."], "frozen": ["norm", "mlp.down"]}
    options = {**SGD, "parameter_budget": 0.5, "parameter_allocator": LayerQuota(), **patterns}
    made = select(inputs, tmp_path / "out", options, config="a: 1\n")
    mask, scores = made.mask(), made.parameter_scores()
    allowed = [n for n in scores if "layers." in n and "norm" not in n and "mlp.down" not in n]
    assert 0 < len(allowed) < len(scores) == len(mask)
    assert sum(int(m.sum()) for m in mask.values()) == sum(scores[n].numel() for n in allowed) // 2
    assert not any(bool(mask[n].any()) for n in mask if n not in allowed)
    plain = select(inputs, tmp_path / "plain", SGD)
    reallocate(
        plain.folder,
        tmp_path / "again",
        parameter_budget=0.5,
        data_budget=0.1,
        parameter_allocator=LayerQuota(),
        data_allocator=TopK(),
        config="a: 1\n",
        **patterns,
    )
    name = "mask.safetensors"
    assert contents(tmp_path / "again")[name] == contents(tmp_path / "out")[name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen": ["lm_tail"]}, "model.frozen has the pattern 'lm_tail', which no parameter's name contains"),
        ({"frozen": ["*"]}, "leave no parameter to train"),
        (
            {"trainable": ["norm"], "parameter_budget": 10**6},
            r"model\.parameter_budget is 1,000,000, but there are only \d+ trainable weights",
        ),
        ({"data_allocator": TokenBudget(), "data_budget": 9999}, r"there are only \d+ supervised tokens"),
    ],
)
def test_what_cannot_be_had_is_refused_before_any_work(
    inputs: Inputs, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """With the key and the value; the folder is not claimed."""
    with pytest.raises(UserError, match=message):
        select(inputs, tmp_path / "out", {**SGD, **options})
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_what_an_allocator_refuses_is_told_with_the_options(inputs: Inputs, tmp_path: Path) -> None:
    """An allocator knows no options; whoever calls it names them."""
    message = "1 tokens: token_budget has a budget of 1 supervised tokens, but .*; raise the budget"
    with pytest.raises(UserError, match=rf"^model\.data_allocator, with model\.data_budget at {message}"):
        select(inputs, tmp_path / "out", {**SGD, "data_allocator": TokenBudget(), "data_budget": 1})


def test_a_budget_of_tokens_and_one_that_is_a_limit(inputs: Inputs, tmp_path: Path) -> None:
    """Chosen tokens stay within the budget; positive scores alone may be fewer than it."""
    made = select(inputs, tmp_path / "t", {**SGD, "data_allocator": TokenBudget(), "data_budget": 20})
    rows = made.examples.to_pylist()
    assert 0 < sum(row["num_tokens"] for row in rows if row["selected"]) <= 20
    made = select(inputs, tmp_path / "p", {**SGD, "data_allocator": PositiveOnly(), "data_budget": None})
    assert made.example_ids == [row["example_id"] for row in made.examples.to_pylist() if (row["score"] or 0) > 0]


@pytest.mark.parametrize("order", ["both", "parameters", "parameters_then_data", "data_then_parameters"])
def test_near_duplicates_are_collapsed_first(inputs: Inputs, tmp_path: Path, order: str) -> None:
    """Of two equal records one stays, whatever the order; table, manifest and summary tell of the other."""
    options = {**SGD, "order": order, "data_budget": None, "near_duplicates": NearDuplicates(0.9)}
    made = select(inputs, tmp_path / "out", options)
    assert made.example_ids == [i for i in OK if i != 8]
    assert made.manifest["counts"]["examples"] == {"selected": 7, "scored": 8, "near_duplicates": 1, "rows": 10}
    assert made.manifest["near_duplicates"] == {"threshold": 0.9, "ngram": 3}
    assert {row["example_id"]: row["duplicate_of"] for row in made.examples.to_pylist() if row["duplicate_of"]} == {
        8: 7
    }
    assert "(8 scored, 1 empty, 1 truncated, 1 near-duplicates)" in summary(made)


def test_a_count_above_what_stays_is_told(inputs: Inputs, tmp_path: Path) -> None:
    """The error says how many are left and why; a share buys what there is."""
    options = {**SGD, "near_duplicates": NearDuplicates(0.9)}
    with pytest.raises(UserError, match=r"is 8, but only 7 examples .* once 1 near-duplicates are collapsed; lower it"):
        select(inputs, tmp_path / "out", {**options, "data_budget": 8})
    assert len(select(inputs, tmp_path / "all", {**options, "data_budget": 1.0}).example_ids) == 7
