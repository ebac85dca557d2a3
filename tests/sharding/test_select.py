"""A selection on several ranks is the one that a single process makes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from dualsft.allocators import (
    Diverse,
    LayerQuota,
    PerSourceQuota,
    PositiveOnly,
    Proportional,
    Structured,
    TokenBudget,
    UniformPerLayer,
)
from dualsft.models.loading import parameter_shapes
from dualsft.paths import Piece, PoolPath, ScoringPath, TargetPath
from dualsft.scorers import DiagonalFisher, HessianVector, ParameterStatistics, Scorer
from dualsft.selection import Selection, Warmup, load_selection
from dualsft.selection.paths.settings import PathSettings
from dualsft.selection.prior import Prior
from dualsft.sharding.strategy import FSDP2
from tests.world.folders import watched
from tests.world.jobs import ADAM, SGD, Inputs, select, write_inputs
from tests.world.ranks import run_on_ranks

pytestmark = pytest.mark.heavy

# at the base model the prior's gradient is zero: in float32 its cosine would be that of rounding
PRIOR: dict[str, Any] = {"prior": Prior(weight=0.5, fraction=0.5), "dtype": "float64"}
PLAIN: dict[str, dict[str, Any]] = {
    "first order": {**SGD, "token_scores": True},
    "re-scored examples": {**SGD, "order": "parameters_then_data", "rounds": 2},
    "re-scored weights": {**SGD, "order": "data_then_parameters", "trainable": ["proj"]},
    "difference": {**SGD, "scorer": HessianVector(method="finite_difference"), "step_size": 0.01},
    "second derivatives": {
        **SGD,
        "scorer": HessianVector(),
        "step_size": 0.01,
        **PRIOR,
    },
    "squares": {**SGD, "scorer": DiagonalFisher(source="empirical_fisher"), **PRIOR},
}
WARM: dict[str, dict[str, Any]] = {
    "adam": {"warmup": Warmup(fraction=0.5, epochs=2, learning_rate=1e-3, keep=True)},
    "adam's second moment": {
        **ADAM,
        "scorer": DiagonalFisher(source="second_moment"),
        "prior": Prior(weight=0.5, fraction=0.5),
    },
}
WALK = PathSettings(along=TargetPath(), epochs=2, learning_rate=1e-3, pieces=2, held_out=0.0, tolerance=10.0)


class WholeRows(ScoringPath):
    """Somebody's path, which looks at whole rows of the way."""

    def direction(self, piece: Piece) -> Tensor:
        """The way over its rows' norms."""
        way = piece.start - piece.end
        return way / way.flatten(1).norm(dim=-1, keepdim=True).clamp(min=1e-4) if way.dim() > 1 else way


class RowNorms(Scorer):
    """Somebody's rule, which looks at whole rows and at the whole matrix."""

    def direction(self, s: ParameterStatistics) -> Tensor:
        """The gradient over its rows' norms."""
        v = s.validation_gradient
        return s.step_size * v / v.flatten(1).norm(dim=-1, keepdim=True).clamp(min=1e-3) if v.dim() > 1 else v


OTHERS: dict[str, dict[str, Any]] = {
    "whole rows": {**SGD, "scorer": RowNorms(), "parameter_allocator": Structured("row")},
    "layers": {**SGD, "parameter_allocator": LayerQuota(), "data_allocator": TokenBudget(), "data_budget": 60},
    "each layer": {**SGD, "parameter_allocator": UniformPerLayer(), "data_allocator": PositiveOnly()},
    "proportional": {**SGD, "parameter_allocator": Proportional(), "data_allocator": Diverse()},
    "sources": {
        **SGD,
        "data_allocator": PerSourceQuota("prompt"),
        "gradient_checkpointing": True,
        "stability": True,
        "parameter_scores": "bfloat16",
    },
    "along the target": {"path": replace(WALK, columns="product"), "token_scores": True},
    "along the pool": {**ADAM, "path": replace(WALK, along=PoolPath()), "offload_optimizer": "always"},
}


Runs = dict[str, dict[str, Any]]


def select_all(
    inputs: Inputs,
    folder: Path,
    runs: Runs,
    count: int,
    data: dict[str, Any] | None = None,
    strategy: Callable[[], Strategy | str] = FSDP2,
) -> None:
    """Each of these selections, in a folder of its name; data options may be given."""
    for name, options in runs.items():
        select(inputs, folder / name, options, data, ranks={"strategy": strategy(), "devices": count})


def assert_same(found: Selection, expected: Selection, relative: float = 1e-5) -> None:
    """The same scores within a share of the largest, by default float32 rounding, and the same choice."""
    for name in expected.examples.column_names:
        values, right = found.examples[name].to_pylist(), expected.examples[name].to_pylist()
        if any(isinstance(value, float) for value in right):
            assert [value is None for value in values] == [value is None for value in right]
            right = [value for value in right if value is not None]
            size = max(map(abs, right))
            assert [value for value in values if value is not None] == pytest.approx(right, abs=relative * size), name
        else:
            assert values == right, name
    # a score near the middle between two numbers of bfloat16 may become either
    kept = 2**-8 if expected.about.settings["parameter_scores"] == "bfloat16" else 1e-7
    ours, right_scores = found.parameter_scores(), expected.parameter_scores()
    for name, (score, right_score) in pairs(ours, right_scores).items():
        size = float(right_score.abs().max())
        torch.testing.assert_close(score, right_score, rtol=0, atol=max(relative, kept) * size, msg=name)
    assert all(torch.equal(mask, right_mask) for mask, right_mask in pairs(found.mask(), expected.mask()).values())
    assert found.records == expected.records
    for part in ("counts", "rounds", "budgets"):
        assert found.manifest[part] == expected.manifest[part]
    assert_same_diagnostics(found, expected)


def assert_same_diagnostics(found: Selection, expected: Selection) -> None:
    """The same counts and sums, tensor by tensor, and the same cosines within float32 rounding."""
    for name in ("name", "size", "selected"):
        assert found.parameters[name].to_pylist() == expected.parameters[name].to_pylist()
    ours, right = found.diagnostics, expected.diagnostics
    assert ours.basis.target == right.basis.target
    assert (ours.sources is None) == (right.sources is None)
    if ours.sources and right.sources:
        assert ours.sources.column == right.sources.column
        for group, expected_group in zip(ours.sources.groups, right.sources.groups, strict=True):
            assert vars(group) == {
                **vars(expected_group),
                "score_sum": pytest.approx(expected_group.score_sum, rel=1e-4),
            }
    assert ours.examples.captured == pytest.approx(right.examples.captured, rel=1e-3)
    assert ours.basis.alignment.keys() == right.basis.alignment.keys()
    for name, of in right.basis.alignment.items():
        # at the base model the prior's gradient is what rounding leaves of it, and so is its cosine
        assert vars(ours.basis.alignment[name]) == pytest.approx(vars(of), abs=1e-2)
    assert (ours.basis.stability is None) == (right.basis.stability is None)
    if ours.basis.stability and right.basis.stability:
        assert vars(ours.basis.stability) == pytest.approx(vars(right.basis.stability), abs=1e-3)


def pairs(ours: dict[str, Any], right: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The values of two dictionaries of the same keys."""
    assert ours.keys() == right.keys()
    return {name: (ours[name], right[name]) for name in right}


def test_whatever_is_chosen_by_is_chosen_on_ranks(tmp_path: Path) -> None:
    """A stranger's scorer, every allocator, several validation sets, packed and recomputed."""
    inputs = write_inputs(tmp_path)
    data = {"packing": True, "validation": {"a": inputs.validation, "b": inputs.train}}
    run_on_ranks(2, select_all, inputs, tmp_path / "ranks", OTHERS, 2, data)
    for name, options in OTHERS.items():
        expected = select(inputs, tmp_path / "alone" / name, options, data)
        assert_same(load_selection(tmp_path / "ranks" / name), expected)


def test_a_warmed_up_selection_on_ranks_is_that_of_one_process(tmp_path: Path) -> None:
    """With the second moment of a warm-up whose batches the ranks share, and a teacher beside the warmed-up model."""
    inputs, count = write_inputs(tmp_path), 4
    # Adam's first steps are all of one size, whatever the gradient, and so magnify rounding
    runs = {**WARM, "somebody's path": {"path": replace(WALK, along=WholeRows()), "dtype": "float64"}}
    run_on_ranks(count, select_all, inputs, tmp_path / "ranks", runs, count)
    for name, options in runs.items():
        expected = select(inputs, tmp_path / "alone" / name, options)
        assert_same(load_selection(tmp_path / "ranks" / name), expected)
    kept = {"warmup": Warmup(checkpoint=str(tmp_path / "ranks" / "adam" / "warmup"))}
    run_on_ranks(count, select_all, inputs, tmp_path / "ranks", {"again": kept}, count)
    assert_same(load_selection(tmp_path / "ranks" / "again"), load_selection(tmp_path / "alone" / "adam"))


@pytest.mark.parametrize(("count", "names"), [(3, list(PLAIN)), (1, ["first order"])])
def test_a_selection_on_ranks_is_that_of_one_process(count: int, names: list[str], tmp_path: Path) -> None:
    """Scores of both sides, masks and subsets, with re-scored orders, curvature and a prior."""
    inputs, runs = write_inputs(tmp_path), {name: PLAIN[name] for name in names}
    run_on_ranks(count, select_all, inputs, tmp_path / "ranks", runs, count)
    for name, options in runs.items():
        expected = select(inputs, tmp_path / "alone" / name, options)
        assert_same(load_selection(tmp_path / "ranks" / name), expected)


def peak_of(inputs: Inputs, folder: Path, options: dict[str, Any], count: int) -> int:
    """The most bytes that lie in a folder while the ranks select."""
    with watched(folder) as sizes:
        select(inputs, folder, options, ranks={"strategy": FSDP2(), "devices": count})
    return max(sizes)


def test_ranks_take_no_more_on_the_disk_than_one_process(tmp_path: Path) -> None:
    """Scores of weights are written once, and linked into the selection, in rounds too."""
    inputs = write_inputs(tmp_path, dtype=torch.bfloat16, hidden_size=128, intermediate_size=256)
    weights = sum(torch.Size(shape).numel() for shape in parameter_shapes(inputs.model).values())
    once = {**ADAM, "prior": Prior(weight=0.5, fraction=0.5), "dtype": "bfloat16"}
    turns = {**SGD, "order": "parameters_then_data", "rounds": 2, "dtype": "bfloat16"}  # P v, two sums, and scores
    for name, options, most in (("once", once, 10), ("turns", turns, 16)):
        peak = max(run_on_ranks(2, peak_of, inputs, tmp_path / name, options, 2))
        assert most * weights * 0.95 < peak < (most + 0.7) * weights, name
