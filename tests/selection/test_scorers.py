"""Every scorer, through the real trainer, against the method with every matrix written out (`dense.py`)."""

import json
from collections.abc import Callable
from functools import cache

import pytest
import torch

from dualsft.matrix import curvature
from dualsft.scorers import DiagonalFisher, FirstOrder, HessianVector, Scorer
from dualsft.selection import Selection, Warmup
from dualsft.selection.step import StepSize
from tests.references import Dense, float64_throughout
from tests.world.data import LINES
from tests.world.jobs import Inputs, select, write_inputs
from tests.world.models import DENSE

SCORERS: dict[str, tuple[Scorer, str, float]] = {
    "first order": (FirstOrder(), "none", 1e-10),
    "diagonal Fisher of the warm-up": (DiagonalFisher(), "second_moment", 1e-10),
    "diagonal Fisher of the validation set": (DiagonalFisher("empirical_fisher"), "empirical_fisher", 1e-10),
    "Hessian, exact": (HessianVector(), "hessian", 1e-10),
    "Hessian, by differences": (HessianVector("finite_difference"), "hessian", 1e-6),
}
"""The scorer, its curvature in `Dense`, and how near to it, relative to the largest entry."""
PRECONDITIONERS = ("none", "adam")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """The usual pool, three rows of it to validate on, and a model that has room for its Hessian."""
    some = [LINES[i] for i in (0, 7, 9)]
    return write_inputs(tmp_path_factory.mktemp("dense"), validation=some, noise=0.1, **DENSE)


@pytest.fixture(scope="module")
def checkpoint(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A scoring checkpoint with its second moment."""
    folder = tmp_path_factory.mktemp("warmup")
    select(inputs, folder / "out", {"warmup": Warmup(fraction=0.5, epochs=2, learning_rate=1e-2, keep=True)})
    return str(folder / "out" / "warmup")


@pytest.fixture(scope="module")
def dense(inputs: Inputs, checkpoint: str) -> Dense:
    """The reference."""
    with float64_throughout():
        return Dense.at(checkpoint, inputs)


@pytest.fixture(autouse=True)
def short_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences as near to the derivative as float64 throughout allows."""
    monkeypatch.setattr(curvature, "_RELATIVE_STEP", {torch.float64: 1e-7})


Run = Callable[[str, str, StepSize], Selection]


@pytest.fixture(scope="module")
def run(inputs: Inputs, checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """(scorer's name, preconditioner, step size) -> a float64 selection at the checkpoint."""

    @cache
    def made(name: str, preconditioner: str, step_size: StepSize) -> Selection:
        options = {"scorer": SCORERS[name][0], "preconditioner": preconditioner, "step_size": step_size}
        at = {"warmup": Warmup(checkpoint=checkpoint), "dtype": "float64"}
        with float64_throughout():
            return select(inputs, tmp_path_factory.mktemp("run") / "out", {**at, **options})

    return made


def telling_step(dense: Dense, kind: str, preconditioner: str) -> float:
    """A step size at which the second-order term is a good part of the first."""
    bend = (dense.curvature(kind) @ dense.step(preconditioner)).norm()
    return 0.5 * float(dense.validation.mean(0).norm() / bend) if bend else 0.1


@pytest.mark.slow
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("name", SCORERS)
def test_scores_equal_the_dense_method(dense: Dense, run: Run, name: str, preconditioner: str) -> None:
    """Both score vectors are G u and u ⊙ Σ_i g_i with u from the dense H, and both add up to the quadratic's gain."""
    _, kind, relative = SCORERS[name]
    step_size = telling_step(dense, kind, preconditioner)
    selection = run(name, preconditioner, step_size)
    scores = selection.examples["score"].to_pylist()
    rows = torch.tensor([scores[i] for i in dense.ids], dtype=torch.float64)
    columns = dense.flat(selection.parameter_scores())
    u = dense.direction(kind, preconditioner, step_size)
    expected = dense.pool @ u
    assert torch.allclose(rows, expected, rtol=0, atol=relative * float((dense.pool * u).abs().sum(1).max()))
    expected_columns = u * dense.pool.sum(0)
    largest = float(expected_columns.abs().max())
    # stored in float32
    assert torch.allclose(columns, expected_columns, rtol=1e-6, atol=max(relative, 1e-9) * largest)
    d = dense.step(preconditioner)
    gain = step_size * dense.validation.mean(0) @ d - step_size**2 / 2 * d @ dense.curvature(kind) @ d
    identity = selection.manifest["sum_identity"]
    size = float((u * dense.pool.sum(0)).abs().sum())
    for found in (
        identity["row_sum"],
        identity["column_sum"],
        selection.manifest["prediction"]["predicted_improvement"],
    ):
        assert found == pytest.approx(float(gain), abs=relative * size)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("name", list(SCORERS)[1:])
def test_the_prediction_is_told(dense: Dense, run: Run, name: str, preconditioner: str) -> None:
    """The manifest has <v, d>, dᵀHd, the gain at η, and how large the second-order term of u is against the first."""
    _, kind, relative = SCORERS[name]
    eta = telling_step(dense, kind, preconditioner)
    told = run(name, preconditioner, eta).manifest["prediction"]
    d, p = dense.step(preconditioner), dense.preconditioner(preconditioner)
    v, bend = dense.validation.mean(0), dense.curvature(kind) @ d
    near = max(10 * relative, 1e-9)
    assert told == {
        "step_size": eta,
        "slope": pytest.approx(float(v @ d), rel=near),
        "curvature": pytest.approx(float(d @ bend), rel=near),
        "predicted_improvement": pytest.approx(float(eta * v @ d - eta**2 / 2 * d @ bend), rel=near),
        "second_order_share": pytest.approx(float(eta / 2 * (p * bend).norm() / (p * v).norm()), rel=near),
    }


@pytest.mark.slow
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("name", list(SCORERS)[1:])
def test_the_automatic_step_is_the_minimiser(dense: Dense, run: Run, name: str, preconditioner: str) -> None:
    """η = <v, d> / dᵀHd with the scorer's own H, and the predicted gain is half of <v, d>² / dᵀHd."""
    _, kind, relative = SCORERS[name]
    d = dense.step(preconditioner)
    slope, curvature = float(dense.validation.mean(0) @ d), float(d @ dense.curvature(kind) @ d)
    assert slope > 0
    assert curvature > 0
    told = json.loads((run(name, preconditioner, "auto").folder / "manifest.json").read_text())
    assert told["step_size"] == "auto"
    assert told["prediction"]["step_size"] == pytest.approx(slope / curvature, rel=max(10 * relative, 1e-9))
    gain = told["prediction"]["predicted_improvement"]
    assert gain == pytest.approx(slope**2 / curvature / 2, rel=max(10 * relative, 1e-9))
