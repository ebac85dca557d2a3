"""An audit's figures, on problems whose answer is known."""

from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from dualsft.experiments.audit_plan import Side
from dualsft.experiments.judgement import AuditRun, as_rows, judge
from dualsft.scorers import FirstOrder, HessianVector, ParameterStatistics, Scorer

EXAMPLES, WEIGHTS, STEP = 40, 12, 0.02


class Quadratic:
    """Examples l_i(θ) = ½ |θ − a_i|² and an objective V(θ) = ½ (θ − b)ᵀ H (θ − b), at θ = 0; all in float64."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.targets, self.best = draw(EXAMPLES, WEIGHTS) + 1.0, draw(WEIGHTS) + 2.0
        root = draw(WEIGHTS, WEIGHTS) / WEIGHTS**0.5
        self.hessian = root @ root.T + torch.eye(WEIGHTS, dtype=torch.float64)

    @property
    def gradients(self) -> Tensor:
        """g_i at θ = 0."""
        return -self.targets

    def value(self, theta: Tensor) -> float:
        """V(θ)."""
        return float((theta - self.best) @ self.hessian @ (theta - self.best) / 2)

    def gain(self, examples: Sequence[int], weights: Sequence[int]) -> float:
        """By how much one step on the mean over these examples, of these weights alone, lowers V."""
        step = torch.zeros(WEIGHTS, dtype=torch.float64)
        step[list(weights)] = -STEP * self.gradients[list(examples)].mean(0)[list(weights)]
        return self.value(torch.zeros_like(step)) - self.value(step)

    def matrix(self, scorer: Scorer) -> Tensor:
        """M_ij = g_ij u_j."""
        pool, v = self.gradients.mean(0), -self.hessian @ self.best
        known = ParameterStatistics(
            "theta",
            torch.zeros_like(v),
            v,
            torch.ones_like(v),
            STEP,
            EXAMPLES,
            pool,
            hessian_vector=self.hessian @ pool,
        )
        return self.gradients * scorer.direction(known)


def audited(scorer: Scorer, name: str, rearranged: str = "") -> list[AuditRun]:
    """Random subsets of examples, masks and pairs of the quadratic problem, with predicted and measured gains."""
    problem, generator = Quadratic(), np.random.default_rng(1)
    matrix, runs = problem.matrix(scorer), []
    for side in get_args(Side):
        for number in range(40):
            examples = (
                range(EXAMPLES) if side == "parameters" else generator.choice(EXAMPLES, 10, replace=False).tolist()
            )
            weights = range(WEIGHTS) if side == "data" else generator.choice(WEIGHTS, 4, replace=False).tolist()
            predicted = EXAMPLES / len(examples) * float(matrix[list(examples)][:, list(weights)].sum())
            gains = {0: problem.gain(examples, weights)}
            runs.append(AuditRun(side, "random", str(number), name, 1, STEP, predicted, gains, {}))
    if not rearranged:
        return runs
    order = generator.permutation(len(runs)) if rearranged == "shuffled" else range(len(runs))
    sign = -1 if rearranged == "reversed" else 1
    predictions = [sign * runs[k].predicted for k in order]
    return [AuditRun(**{**vars(run), "predicted": p}) for run, p in zip(runs, predictions, strict=True)]


@pytest.mark.parametrize("side", ["data", "parameters", "joint"])
def test_second_order_is_right_on_a_quadratic(side: str) -> None:
    """Its order is that of the measured gains and its size theirs; the first order's size is not."""
    second = judge(audited(HessianVector(), "hessian_vector"), calibrated=True)[side]["hessian_vector"]
    first = judge(audited(FirstOrder(), "first_order"), calibrated=True)[side]["first_order"]
    assert second["spearman"] > 0.99
    assert second["spearman_interval"][0] > 0.97
    assert second["slope"] == pytest.approx(1.0, abs=0.03)
    assert second["factor"] == pytest.approx(1.0, abs=0.02)
    assert abs(second["slope"] - 1) < abs(first["slope"] - 1)
    assert second["calibration_error"] < first["calibration_error"]
    assert "can be trusted" in second["verdict"]


def test_shuffled_scores_are_found_to_tell_nothing() -> None:
    """The interval of the correlation covers zero."""
    found = judge(audited(HessianVector(), "s", "shuffled"), calibrated=True)
    for side in ("data", "parameters", "joint"):
        low, high = found[side]["s"]["spearman_interval"]
        assert low < 0 < high
        assert "not better than chance" in found[side]["s"]["verdict"]


def test_reversed_scores_are_found_to_be_reversed() -> None:
    """The correlation is as far below zero as it was above."""
    found = judge(audited(HessianVector(), "s", "reversed"), calibrated=True)["data"]["s"]
    assert found["spearman"] < -0.99
    assert found["slope"] == pytest.approx(-1.0, abs=0.03)
    assert "reversed" in found["verdict"]


def made(family: str, label: str, predicted: float, gains: dict[int, float], steps: int = 5) -> AuditRun:
    """A run of the data side."""
    return AuditRun("data", family, label, "s", steps, 0.1, predicted, gains, {})


def test_controls_use_all_their_seeds() -> None:
    """The chosen and the lowest are trained more often than the others, and compared by all of these."""
    runs = [made("chosen", "chosen", 3.0, {0: 0.3, 1: 0.5, 2: 0.4})]
    runs += [made("random", str(k), 1.0 + k / 10, {0: 0.1 + k / 100}) for k in range(6)]
    runs += [
        made("band", f"band {k}", 3.0 - k, {0: 0.3 - k / 10, **({1: 0.0, 2: 0.2} if k == 2 else {})}) for k in range(3)
    ]
    found = judge(runs, calibrated=True)["data"]["s"]
    assert found["seeds"] == 1
    assert found["chosen_over_random"] == pytest.approx(0.4 - 0.125)
    assert found["chosen_over_lowest"] == pytest.approx(0.4 - 0.1)
    assert [band["gain"] for band in found["bands"]] == pytest.approx([0.3, 0.2, 0.1])
    assert len(as_rows(runs)) == 3 + 6 + 5


def test_settings_are_judged_apart() -> None:
    """Each number of steps and learning rate has figures of its own; the first one's are on top."""
    runs = [made("random", str(k), float(k), {0: float(k)}, steps=steps) for steps in (5, 9) for k in range(6)]
    found = judge(runs, calibrated=False)["data"]["s"]
    assert found["steps"] == 5
    assert [setting["steps"] for setting in found["settings"]] == [5, 9]
    assert found["slope"] is None
    assert found["spearman"] == 1.0


def test_a_failed_run_leaves_the_others_figures() -> None:
    """A variant without the seed that the others have is judged by those that it has."""
    runs = [made("chosen", "chosen", 9.0, {1: 9.0, 2: 11.0})]
    runs += [made("random", str(k), float(k), {0: float(k), 1: float(k)}) for k in range(6)]
    runs += [made("random", "6", 6.0, {1: 6.0}), made("random", "7", 7.0, {0: 7.0})]
    found = judge(runs, calibrated=True)["data"]["s"]
    assert found["seeds"] == 2
    assert found["spearman"] == 1.0
    assert found["slope"] == pytest.approx(1.0, abs=0.1)
    assert found["chosen_over_random"] == pytest.approx(10.0 - (2 * 15 + 6 + 7) / 14)
