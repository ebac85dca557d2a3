"""A selection on several ranks is the one that a single process makes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dualsft.distributed.strategy import FSDP2
from dualsft.objectives import Prior
from dualsft.scorers import DiagonalFisher, HessianVector
from dualsft.selection import Selection, load_selection
from tests.distributed.ranks import run_on_ranks
from tests.selection.runs import ADAM, SGD, Inputs, select, write_inputs

PLAIN: dict[str, dict[str, Any]] = {
    "first order": {**SGD, "token_scores": True},
    "re-scored examples": {**SGD, "order": "parameters_then_data", "rounds": 2},
    "re-scored weights": {**SGD, "order": "data_then_parameters", "trainable": ["proj"]},
    "difference": {**SGD, "scorer": HessianVector(method="finite_difference"), "step_size": 0.01},
    "second derivatives": {
        **SGD,
        "scorer": HessianVector(),
        "step_size": 0.01,
        "prior": Prior(weight=0.5, fraction=0.5),
    },
    "squares": {**SGD, "scorer": DiagonalFisher(source="empirical_fisher"), "prior": Prior(weight=0.5, fraction=0.5)},
}
WARM: dict[str, dict[str, Any]] = {
    "adam": ADAM,
    "adam's second moment": {
        **ADAM,
        "scorer": DiagonalFisher(source="second_moment"),
        "prior": Prior(weight=0.5, fraction=0.5),
    },
}


def select_all(inputs: Inputs, folder: Path, runs: dict[str, dict[str, Any]], count: int) -> None:
    """Each of these selections, in a folder of its name."""
    for name, options in runs.items():
        select(inputs, folder / name, options, ranks={"strategy": FSDP2(), "devices": count})


def assert_same(found: Selection, expected: Selection) -> None:
    """The same scores within float32 rounding, and the same choice."""
    assert found.examples.drop(["score"]) == expected.examples.drop(["score"])
    scores = [s for s in expected.examples["score"].to_pylist() if s is not None]
    size = max(map(abs, scores))
    assert [s for s in found.examples["score"].to_pylist() if s is not None] == pytest.approx(scores, abs=1e-5 * size)
    ours, right = found.parameter_scores(), expected.parameter_scores()
    assert ours.keys() == right.keys()
    for name, score in right.items():
        torch.testing.assert_close(ours[name], score, rtol=0, atol=1e-5 * float(score.abs().max()), msg=name)
    assert all(torch.equal(mask, right_mask) for mask, right_mask in pairs(found.mask(), expected.mask()))
    assert found.records == expected.records
    for part in ("counts", "rounds", "budgets"):
        assert found.manifest[part] == expected.manifest[part]


def pairs(ours: dict[str, Any], right: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The values of two dictionaries of the same keys."""
    assert ours.keys() == right.keys()
    return [(ours[name], right[name]) for name in right]


@pytest.mark.parametrize("count", [2, 4])
def test_a_warmed_up_selection_on_ranks_is_that_of_one_process(count: int, tmp_path: Path) -> None:
    """With the second moment of a warm-up whose batches the ranks share, and a teacher beside the warmed-up model."""
    inputs = write_inputs(tmp_path)
    run_on_ranks(count, select_all, inputs, tmp_path / "ranks", WARM, count)
    for name, options in WARM.items():
        expected = select(inputs, tmp_path / "alone" / name, options)
        assert_same(load_selection(tmp_path / "ranks" / name), expected)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_selection_on_ranks_is_that_of_one_process(count: int, tmp_path: Path) -> None:
    """Scores of both sides, masks and subsets, with re-scored orders, curvature and a prior."""
    inputs = write_inputs(tmp_path)
    run_on_ranks(count, select_all, inputs, tmp_path / "ranks", PLAIN, count)
    for name, options in PLAIN.items():
        expected = select(inputs, tmp_path / "alone" / name, options)
        assert_same(load_selection(tmp_path / "ranks" / name), expected)
