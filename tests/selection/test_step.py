from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dualsft import SelectionModule
from dualsft.errors import UserError
from dualsft.scorers import DiagonalFisher, HessianVector, ParameterStatistics, SecondOrderScorer
from dualsft.selection import Warmup, passes
from dualsft.selection.checks import check_step_size
from dualsft.selection.step import Along, describe, settle, warning
from tests.world.faults import kill_at
from tests.world.jobs import SGD, Inputs, contents, select


def test_a_number_is_taken_as_it_is() -> None:
    """Whatever the quadratic looks like."""
    assert settle(2e-5, [Along(-1.0, -1.0, None)]) == 2e-5


def test_auto_minimises_the_mean_of_the_sets() -> None:
    """η = mean <v, d> / mean dᵀHd, at which the mean predicted gain is largest."""
    sets = [Along(3.0, 2.0, 1.0), Along(1.0, 6.0, 1.0)]
    step = settle("auto", sets)
    assert step == 0.5

    def gain(size: float) -> float:
        return sum(of.gain(size) for of in sets) / 2

    assert gain(step) == pytest.approx(0.5)
    assert gain(step) > max(gain(0.99 * step), gain(1.01 * step))


@pytest.mark.parametrize(
    ("along", "message"),
    [
        (Along(1.0, -0.5, 1.0), r"the curvature along the pool step is -0\.5, not positive.*a number for"),
        (Along(1.0, 0.0, 1.0), "curvature along the pool step is 0, not positive"),
        (Along(1.0, float("nan"), 1.0), "curvature along the pool step is nan"),
        (Along(-0.25, 2.0, 1.0), r"does not lower the validation objective \(<v, d> is -0\.25.*a number for"),
    ],
)
def test_auto_without_a_minimum_ahead_is_refused(along: Along, message: str) -> None:
    """A quadratic that has none, or has it behind, is told with its figure and the way out."""
    with pytest.raises(UserError, match=message):
        settle("auto", [along])


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_step_sizes_that_are_none(value: Any) -> None:
    """Refused with the value."""
    with pytest.raises(UserError, match=f"model.step_size is {value}; give a positive number, or auto"):
        check_step_size(value, HessianVector())


def test_the_way_out_is_one_that_the_run_can_take() -> None:
    """Once scores depend on auto, the run cannot go on with a number; before that it can."""
    uphill = [Along(-1.0, 1.0, 1.0)]
    with pytest.raises(UserError, match="go on with --resume and a number"):
        settle("auto", uphill)
    with pytest.raises(UserError, match=r"start anew \(--overwrite\) with a number"):
        settle("auto", uphill, bound=True)


def test_a_step_beyond_the_quadratic_is_warned_of() -> None:
    """Where the second-order term outweighs the first, the run says so."""
    long = describe(4.0, {"a": Along(1.0, 1.0, 1.0)}, named=False)
    assert long["predicted_improvement"] == -4.0
    assert "the second-order term is 2 times the first at a step size of 4, more than a quadratic" in str(warning(long))


def test_auto_needs_a_curvature() -> None:
    """First order has none, which is said before anything is loaded."""
    with pytest.raises(UserError, match="auto, but the scorer FirstOrder has no curvature"):
        SelectionModule("nowhere", step_size="auto", **SGD)
    check_step_size("auto", DiagonalFisher())


def test_a_negligible_second_order_term_is_told() -> None:
    """Below a thousandth of the first there is a warning with the figure; from there on, and without one, none."""
    small = describe(2e-5, {"a": Along(1.0, 1.0, 10.0)}, named=False)
    assert small["second_order_share"] == pytest.approx(1e-4)
    assert "the second-order term is 0.0001 of the first at a step size of 2e-05" in str(warning(small))
    assert warning(describe(2e-4, {"a": Along(1.0, 1.0, 10.0)}, named=False)) is None
    assert warning(describe(2e-5, {"a": Along(1.0, None, None)}, named=False)) is None


def test_each_set_is_told_of_by_name() -> None:
    """Beside the mean."""
    told = describe(0.5, {"a": Along(3.0, 2.0, 1.0), "b": Along(1.0, 6.0, 3.0)}, named=True)
    assert told["sets"]["b"] == {
        "slope": 1.0,
        "curvature": 6.0,
        "predicted_improvement": -0.25,
        "second_order_share": 0.75,
    }
    assert (told["slope"], told["curvature"], told["predicted_improvement"]) == (2.0, 4.0, 0.5)


class Downwards(SecondOrderScorer):
    """A curvature of the wrong sign."""

    needs = ("pool_gradient",)

    def curvature(self, statistics: ParameterStatistics) -> Tensor:
        """Minus the pool's gradient."""
        assert statistics.pool_gradient is not None
        return -statistics.pool_gradient


def test_a_run_whose_quadratic_has_no_minimum_can_go_on(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error keeps the passes that are done; resumed with a number the run repeats none, and ends as one with it."""
    options = {**SGD, "scorer": Downwards()}
    expected = contents(select(inputs, tmp_path / "number", {**options, "step_size": 0.1}).folder)
    with pytest.raises(UserError, match=r"curvature along the pool step is -.* not positive"):
        select(inputs, tmp_path / "auto", {**options, "step_size": "auto"})
    passed = kill_at(monkeypatch, passes, "gradient_pass", call=0)
    select(inputs, tmp_path / "auto", {**options, "step_size": 0.1}, resume=True)
    assert len(passed) == 1  # the scores
    assert contents(tmp_path / "auto") == expected


def test_a_small_step_is_warned_of(inputs: Inputs, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With a literal learning rate the second-order term changes nothing, and the run says so; at a long step not."""
    options = {**SGD, "scorer": HessianVector()}
    share = select(inputs, tmp_path / "small", options).manifest["prediction"]["second_order_share"]
    assert 0 < share < 1e-3
    assert f"the second-order term is {share:.1g} of the first" in capfd.readouterr().err
    long = select(inputs, tmp_path / "long", {**options, "step_size": 0.1}).manifest["prediction"]
    assert long["second_order_share"] > 1e-3
    assert "second-order" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorer": DiagonalFisher(), **SGD}, "DiagonalFisher needs the second moment of a warm-up"),
        (
            {"scorer": HessianVector("finite_difference"), "dtype": "bfloat16", **SGD},
            "rounding of bfloat16; set model.dtype to float32 and trainer.precision to 32-true",
        ),
    ],
)
def test_what_a_scorer_cannot_have_is_refused_before_work(
    inputs: Inputs, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """In one sentence, and no folder is left."""
    with pytest.raises(UserError, match=message):
        select(inputs, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_second_moment_is_refused_by_the_scorer_too(inputs: Inputs, tmp_path: Path) -> None:
    """Also where the preconditioner does without."""
    options = {"scorer": DiagonalFisher(), "preconditioner": "none", "warmup": Warmup(checkpoint=inputs.model)}
    with pytest.raises(UserError, match=r"has no second_moment\.safetensors"):
        select(inputs, tmp_path / "out", options)


class Greedy(SecondOrderScorer):
    """Asks for what there is not."""

    needs = ("pool_gradient", "third_order")  # type: ignore[assignment]

    def curvature(self, statistics: ParameterStatistics) -> Tensor:
        """Nothing."""
        return torch.zeros_like(statistics.weight)


def test_a_scorer_that_asks_for_what_there_is_not_is_named() -> None:
    """With the word, and the known ones."""
    with pytest.raises(UserError, match="Greedy needs third_order, which is none of empirical_fisher, hessian_vector"):
        SelectionModule("nowhere", scorer=Greedy(), **SGD)
