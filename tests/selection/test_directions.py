import gc
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from dualsft.scorers import FirstOrder, ParameterStatistics, Scorer
from dualsft.selection.dense_training import EPS
from dualsft.selection.directions import Statistics, column_totals, parameter_scores, preconditioner, scorer_direction
from dualsft.selection.held_direction import HeldDirection, masked
from dualsft.selection.objective import weighted_total

GRADIENT = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.0, 3.0, 4.0])}
MOMENTS = {"a": torch.tensor([4.0, 0.0]), "b": torch.ones(3)}


def two_weights() -> nn.Module:
    """A toy with a frozen weight."""
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    model.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
    return model


def statistics(moments: dict[str, Tensor] | None) -> Statistics:
    """Of ten examples."""
    model = two_weights()
    return Statistics(model, weighted_total([(1.0, GRADIENT)], torch.device("cpu")), preconditioner(model, moments), 10)


def test_directions_precondition_by_the_second_moment() -> None:
    """U = (η/n) v / (sqrt(ĉ)+eps); without moments (η/n) v; frozen weights have none; ĉ is not written to."""
    moments = {name: c.clone() for name, c in MOMENTS.items()}
    u = scorer_direction(FirstOrder(), statistics(moments), 0.5)
    assert set(u) == {"a", "b"}
    for name, found in u.items():
        torch.testing.assert_close(found, 0.05 * GRADIENT[name] / (MOMENTS[name].sqrt() + EPS))
        assert torch.equal(moments[name], MOMENTS[name])
    plain = scorer_direction(FirstOrder(), statistics(None), 0.5)
    assert all(torch.equal(plain[name], 0.05 * v) for name, v in GRADIENT.items())


class Recorder(Scorer):
    """Notes which inputs of earlier parameters are still alive."""

    def __init__(self) -> None:
        self.earlier: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []
        self.seen: list[Any] = []

    def direction(self, statistics: ParameterStatistics) -> Tensor:
        """V, copied."""
        gc.collect()
        self.alive.append(sum(reference() is not None for reference in self.earlier))
        self.earlier += [weakref.ref(statistics.validation_gradient), weakref.ref(statistics.preconditioner)]
        self.seen.append((statistics.name, statistics.weight.shape, statistics.step_size, statistics.num_examples))
        return statistics.validation_gradient.clone()


def test_one_parameter_at_a_time() -> None:
    """A scorer sees every parameter's facts, and v and P of a parameter are gone once the next is asked for."""
    scorer = Recorder()
    HeldDirection(scorer_direction(scorer, statistics(MOMENTS), 0.5), two_weights())
    assert scorer.seen == [("a", (2,), 0.5, 10), ("b", (3,), 0.5, 10)]
    assert scorer.alive == [0, 0]


def test_weighted_sums_add_up() -> None:
    """Σ_t c_t G_t by name; what it is made of stays as it was."""
    other = {name: torch.ones_like(g) for name, g in GRADIENT.items()}
    found = weighted_total([(2.0, GRADIENT), (-0.5, other)], torch.device("cpu"))
    assert list(found) == ["a", "b"]
    torch.testing.assert_close(found["a"], torch.tensor([1.5, -4.5]))
    assert GRADIENT["a"].tolist() == [1.0, -2.0]


def test_a_masked_direction_lacks_whole_parameters() -> None:
    """U ⊙ m, and a parameter without a chosen weight is not there at all."""
    mask = {"a": torch.tensor([True, False]), "b": torch.zeros(3, dtype=torch.bool)}
    found = masked(GRADIENT, mask, two_weights())
    assert set(found) == {"a"}
    assert found["a"].tolist() == [1.0, 0.0]


def test_parameter_scores_combine_and_add_up_by_set() -> None:
    """φ_j = u_j Σ_i g_ij of each set, combined entry by entry; each set's total and size are its own."""
    us = [{"a": torch.tensor([1.0, -1.0])}, {"a": torch.tensor([3.0, 2.0])}]
    sums = {"a": torch.tensor([2.0, 1.0])}
    for combination, expected in (("mean", [4.0, 0.5]), ("max", [6.0, 2.0]), ("min", [2.0, -1.0])):
        scores = parameter_scores(us, sums, combination)  # type: ignore[arg-type]
        assert scores["a"].tolist() == expected
    assert [(of.total, of.size) for of in (column_totals(u, sums) for u in us)] == [(1.0, 3.0), (8.0, 8.0)]
