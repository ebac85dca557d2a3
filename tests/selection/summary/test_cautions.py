from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dualsft.allocators import TopK
from dualsft.selection.diagnostics import (
    Basis,
    Diagnostics,
    LengthBin,
    Lengths,
    ScoreFigures,
    SourceGroup,
    Sources,
    Stability,
    Target,
)
from dualsft.selection.summary.cautions import Rule, cautions, cautions_on
from tests.world.jobs import SGD, Inputs, select

SCORES = ScoreFigures(
    scored=100,
    selected=10,
    selected_positive=10,
    score_sum=5.0,
    positive_share=0.5,
    positive_sum=9.0,
    captured=0.6,
    quantiles={"0.0": -1.0, "0.5": 0.0, "1.0": 2.0},
    capture=[0.1] * 100,
)
LENGTHS = Lengths([LengthBin(1, 1, 100, 100, 10)], {"0.5": 30.0}, {"0.5": 20.0}, 3000, 200, 0.3)
MIX = Sources("source", [SourceGroup(n, 50, 50, k, 9, 9, 1.0) for n, k in (("a", 8), ("b", 2), (None, 0))])
SOUND = Diagnostics(SCORES, SCORES, LENGTHS, MIX, Basis(Target(9, {"0.5": 25.0}, {"a": 7, "b": 2}), {}, 50))


def told(**parts: Any) -> list[str]:
    """The cautions on the sound selection with other parts."""
    return list(cautions_on(replace(SOUND, **parts), Rule()))


def target(**parts: Any) -> Basis:
    """The sound basis with another target."""
    assert SOUND.basis.target is not None
    return replace(SOUND.basis, target=replace(SOUND.basis.target, **parts))


def test_a_sound_selection_needs_no_caution() -> None:
    """Nor does one of an earlier release, of which less is known."""
    assert told() == []
    assert told(parameters=None, sources=None, basis=Basis()) == []


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"examples": replace(SCORES, quantiles={"0.0": 0.0, "1.0": 0.0})}, "all scores of the examples are zero"),
        ({"parameters": replace(SCORES, quantiles={"0.0": 0.5, "1.0": 0.5})}, "all scores of the weights are equal"),
        ({"examples": replace(SCORES, selected_positive=7)}, "3 of the 10 chosen examples have no positive score"),
        ({"basis": target(tokens={"0.5": 61.0})}, "are much shorter than the target's (median 20 supervised tokens"),
        ({"basis": target(tokens={"0.5": 6.0})}, "are much longer than the target's"),
        ({"lengths": replace(LENGTHS, correlation=-0.95)}, "rank correlation -0.95 with the supervised tokens"),
        ({"basis": target(sources={"b": 9})}, "(80% of one mix would have to move to make the other)"),
        ({"basis": replace(SOUND.basis, warmup_steps=3)}, "the warm-up took only 3 optimizer steps"),
        ({"basis": replace(SOUND.basis, stability=Stability(0.1, 0.9))}, "hardly agree on the order of the examples"),
    ],
)
def test_each_oddity_has_its_sentence(parts: dict[str, Any], sentence: str) -> None:
    """One sentence that names the figure, and says what to do."""
    (found,) = told(**parts)
    assert sentence in found
    assert found.endswith(".")
    assert found.count(". ") == 0


@pytest.mark.parametrize(
    "parts",
    [
        {"examples": replace(SCORES, selected=100, selected_positive=50)},
        {"basis": target(sources={"elsewhere": 9})},
        {"basis": replace(SOUND.basis, stability=Stability(0.8, None))},
        {"examples": replace(SCORES, scored=8), "lengths": replace(LENGTHS, correlation=0.95)},
    ],
    ids=["everything is taken", "sources of other names", "halves that agree", "a handful of rows"],
)
def test_what_is_not_odd(parts: dict[str, Any]) -> None:
    """Nothing is said where there was no choice, no comparison, or too little to compare."""
    assert told(**parts) == []


def test_the_budget_is_blamed_only_where_it_is_the_reason() -> None:
    """Where a rule leaves positive scores out, it is named in place of the budget; a random draw is told of nothing."""
    harmful = replace(SOUND, examples=replace(SCORES, selected_positive=7))
    (by_score,) = cautions_on(harmful, Rule("TopK", 0))
    assert by_score.endswith("; lower model.data_budget, or take model.data_allocator positive_only.")
    (by_quota,) = cautions_on(harmful, Rule("PerSourceQuota", 43))
    assert by_quota.endswith(
        "; PerSourceQuota took them and left 43 that have one, so that not the budget but this rule is the reason."
    )
    elsewhere = replace(harmful, basis=target(sources={"b": 9}, tokens={"0.5": 61.0}))
    assert len(list(cautions_on(elsewhere, Rule("TopK", 0)))) == 3
    assert list(cautions_on(elsewhere, Rule("RandomExamples", 43))) == []


def test_a_quota_is_not_advised_to_who_has_one() -> None:
    """Its shares are."""
    (told,) = cautions_on(replace(SOUND, basis=target(sources={"b": 9})), Rule("PerSourceQuota", 0))
    assert told.endswith("; look at some, or give per_source_quota other shares.")


def test_the_rule_of_a_selection_is_found_in_it(inputs: Inputs, tmp_path: Path) -> None:
    """By its allocator and its scores: what is passed over has a positive score and is no near-duplicate."""
    made = select(inputs, tmp_path / "out", {**SGD, "data_allocator": TopK(reverse=True), "data_budget": 3})
    table = made.examples.to_pydict()
    left = [s > 0 and not chosen for s, chosen in zip(table["score"], table["selected"], strict=True) if s is not None]
    (told,) = [text for text in cautions(made) if "no positive score" in text]
    assert f"; TopK took them and left {sum(left)} that have one" in told
