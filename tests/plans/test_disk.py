"""What a plan says that lies on the disk, beside what a selection leaves there."""

from collections.abc import Callable
from typing import Any

import pytest

from dualsft.plans.job import DataSizes, Machine, SelectJob
from dualsft.plans.scoring import plan_select
from dualsft.plans.shape import ModelShape
from dualsft.selection import Warmup
from dualsft.selection.prior import Prior
from dualsft.selection.settings import SelectionSettings

WEIGHT, SUM, SCORE, BIT = 2.0, 4.0, 4.0, 0.125
BOTH = {"warmed-up weights": WEIGHT, "second moment": SUM}
SCORED = {"warmed-up weights": WEIGHT, "direction": SUM, "scores": SCORE}
CHOSEN = {"scores": SCORE, "mask.safetensors": BIT}
BARE = {"preconditioner": "none", "warmup": Warmup(fraction=0.0)}
CASES: dict[str, tuple[dict[str, Any], int, list[dict[str, float]]]] = {
    "one set": ({}, 1, [{"state under way": 12}, {**BOTH, "direction": SUM}, SCORED, CHOSEN]),
    "with the prior": (
        {"prior": Prior(weight=0.5)},
        1,
        [{"state under way": 12}, {**BOTH, "direction": SUM}, {**BOTH, "direction": SUM}, SCORED, CHOSEN],
    ),
    "two sets": (
        {"parameter_scores": "bfloat16"},
        2,
        [
            {"state under way": 12},
            {**BOTH, "sums of the validation gradient": 2 * SUM},
            {**BOTH, "sums of the validation gradient": 2 * SUM, "scores": SCORE},
            {**CHOSEN, "rounded scores": 2},
        ],
    ),
    "by turns": (
        {**BARE, "order": "parameters_then_data"},
        1,
        [
            {"direction": SUM},
            {"direction": SUM, "sums of the pool gradient": SUM},
            {"direction": SUM, "sums of the pool gradient": SUM},
            {"direction": SUM, "sums of the pool gradient": SUM, **CHOSEN},
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_phase_has_what_lies_on_the_disk(shape_in: Callable[[str], ModelShape], case: str) -> None:
    """In bytes per weight of a bfloat16 model: one sum beside weights and second moment, and in the end the result."""
    options, sets, expected = CASES[case]
    shape = shape_in("bfloat16")
    job = SelectJob(shape, Machine("cpu"), DataSizes(8, 4, 2, sets=sets), settings=SelectionSettings(**options))
    found = plan_select(job)
    per_weight = [{name: size / shape.count for name, size in phase.disk.items()} for phase in found.phases]
    assert per_weight == [pytest.approx(phase, rel=1e-3) for phase in expected]
    assert sum(found.fullest.disk.values()) == max(sum(phase.disk.values()) for phase in found.phases)
