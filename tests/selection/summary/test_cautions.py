from dataclasses import replace
from typing import Any

import pytest

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
from dualsft.selection.summary.cautions import cautions

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
    return list(cautions(replace(SOUND, **parts)))


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
