"""Which selections share their scores."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dualsft.allocators import TopK
from dualsft.commands import shared_scores

DIVERSE = "dualsft.allocators.Diverse"


class Foreign(TopK):
    """An allocator of a plugin."""


def sources(given: Sequence[Mapping[str, Any]], done: Collection[int] = ()) -> list[int]:
    """Who scores for whom, of selections of which some are done."""
    return shared_scores.sources(given, [k in done for k in range(len(given))])


def settings(**changes: Any) -> Mapping[str, Any]:
    """Settings of select, of which some are others than usual."""
    usual = {"order": "both", "rounds": 1, "parameter_budget": 0.1, "data_budget": 0.1, "data_allocator": None}
    return {"seed_everything": 0, "model": {**usual, "scorer": "first_order", **changes}}


def test_choices_share_scores() -> None:
    """Other budgets and allocators take the scores of the first; another scorer has its own."""
    given = [settings(), settings(data_budget=None), settings(parameter_budget=5), settings(scorer="hessian_vector")]
    assert sources(given) == [0, 0, 0, 3]


def test_the_one_that_measures_most_is_made() -> None:
    """Of several allocators the selection of the one with needs serves all, as the others need nothing of it."""
    assert sources([settings(), settings(data_allocator={"class_path": DIVERSE}), settings()]) == [1, 1, 1]


def test_a_plugin_that_may_fail_is_no_source() -> None:
    """Where another selection has all that is needed, that of a plugin's allocator is made from it, and fails alone."""
    foreign = {"class_path": f"{__name__}.Foreign"}
    assert sources([settings(data_allocator=foreign), settings()]) == [1, 1]
    assert sources([settings(parameter_allocator=foreign), settings()]) == [1, 1]


def test_weights_without_scores_serve_nobody_who_chooses_weights() -> None:
    """A path that takes all weights scores none, so it is a source only for others that take all."""
    everything = settings(parameter_budget=None)
    assert sources([everything, settings()]) == [1, 1]
    assert sources([everything, settings(parameter_budget=None, data_budget=7)]) == [0, 0]
    diverse = settings(parameter_budget=None, data_allocator={"class_path": DIVERSE})
    assert sources([diverse, settings()]) == [0, 1]


def test_sides_behind_scores_are_not_exchanged() -> None:
    """Where one side is scored by the choice of the other, only selections with the same choice of that side share."""
    order = {"order": "data_then_parameters"}
    given = [settings(**order), settings(**order, parameter_budget=0.2), settings(**order, data_budget=0.2)]
    assert sources(given) == [0, 0, 2]
    twice = [settings(**order, rounds=2), settings(**order, rounds=2, parameter_budget=0.2)]
    assert sources(twice) == [0, 1]


def test_what_is_done_serves_first() -> None:
    """Finished scores are used where they have what is needed, and only what they lack is measured anew."""
    diverse = settings(data_allocator={"class_path": DIVERSE})
    assert sources([settings(data_budget=3), settings(), diverse], done=[1]) == [1, 1, 2]
    assert sources([settings(), diverse], done=[1]) == [1, 1]
