from dataclasses import replace

import pytest
import torch

from dualsft.errors import UserError
from dualsft.scorers import DiagonalFisher, HessianVector, ParameterStatistics, SecondOrderScorer

KNOWN = ParameterStatistics(
    "w",
    torch.zeros(2, 2),
    torch.tensor([[1.0, -2.0], [0.0, 4.0]]),
    torch.tensor([[1.0, 0.5], [3.0, 2.0]]),
    0.5,
    2,
    pool_gradient=torch.tensor([[2.0, 1.0], [-1.0, 0.5]]),
    second_moment=torch.tensor([[1.0, 4.0], [0.0, 2.0]]),
    empirical_fisher=torch.tensor([[3.0, 0.0], [2.0, 1.0]]),
    hessian_vector=torch.tensor([[1.0, 2.0], [3.0, -4.0]]),
)


@pytest.mark.parametrize(
    ("scorer", "curvature"),
    [
        (DiagonalFisher(), [[2.0, 2.0], [0.0, 2.0]]),
        (DiagonalFisher("empirical_fisher"), [[6.0, 0.0], [-6.0, 1.0]]),
        (DiagonalFisher(scale=0.5), [[1.0, 1.0], [0.0, 1.0]]),
        (HessianVector(), [[1.0, 2.0], [3.0, -4.0]]),
        (HessianVector("finite_difference"), [[1.0, 2.0], [3.0, -4.0]]),
    ],
    ids=["second moment", "empirical Fisher", "scaled", "exact", "difference"],
)
def test_direction(scorer: SecondOrderScorer, curvature: list[list[float]]) -> None:
    """U = (η/n) P ⊙ (v − ½ η C) with C = c ⊙ P ⊙ ḡ or H (P ⊙ ḡ), entry by entry."""
    expected = torch.tensor(curvature)
    assert torch.equal(scorer.curvature(KNOWN), expected)
    u = 0.25 * KNOWN.preconditioner * (KNOWN.validation_gradient - 0.25 * expected)
    torch.testing.assert_close(scorer.direction(KNOWN), u)


def test_the_step_size_of_the_release() -> None:
    """At η = n x lr and P = 1 the direction is lr (v − ½ lr c ⊙ G), with the pool's gradient summed: G = n ḡ."""
    lr, count, one = 0.03, KNOWN.num_examples, torch.ones(2, 2)
    found = DiagonalFisher().direction(replace(KNOWN, step_size=count * lr, preconditioner=one))
    assert KNOWN.pool_gradient is not None
    assert KNOWN.second_moment is not None
    summed = count * KNOWN.pool_gradient
    expected = lr * (KNOWN.validation_gradient - lr / 2 * KNOWN.second_moment * summed)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_without_sense_is_refused(scale: float) -> None:
    """A diagonal of squared gradients is scaled by a positive, finite number."""
    with pytest.raises(UserError, match="scale of diagonal_fisher is"):
        DiagonalFisher(scale=scale)


@pytest.mark.parametrize("scorer", [DiagonalFisher(), HessianVector()], ids=lambda s: type(s).__name__)
def test_the_second_order_term_vanishes_with_the_step(scorer: SecondOrderScorer) -> None:
    """At the paper's learning rate the direction is the first-order one, up to some 1e-5; statistics stay whole."""
    before = [getattr(KNOWN, name).clone() for name in ("validation_gradient", "second_moment", "hessian_vector")]
    small = replace(KNOWN, step_size=2e-5)
    first = 1e-5 * KNOWN.preconditioner * KNOWN.validation_gradient
    torch.testing.assert_close(scorer.direction(small), first, rtol=1e-4, atol=1e-9)
    scorer.direction(small).zero_()
    after = [getattr(KNOWN, name) for name in ("validation_gradient", "second_moment", "hessian_vector")]
    assert all(map(torch.equal, before, after))
