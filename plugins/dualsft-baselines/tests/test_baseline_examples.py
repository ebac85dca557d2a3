"""The data allocators, on examples made by hand."""

import pytest
import torch
from baseline_cases import doubles, examples
from dualsft_baselines import GradientNorm, Less, LongestResponse, Loss

from dualsft import DataAllocator, UserError


def test_longest_response() -> None:
    """The most supervised tokens win, and of equals the earlier row; scores have no say."""
    pool = examples([9.0, 0.0, 0.0, 0.0, 0.0], num_tokens=[3, 7, 5, 8, 5])
    assert LongestResponse().allocate(pool, 1).tolist() == [16]
    assert LongestResponse().allocate(pool, 3).tolist() == [12, 14, 16]
    assert LongestResponse().allocate(pool, 5).tolist() == [10, 12, 14, 16, 18]


def test_gradient_norm() -> None:
    """The largest norms win, or the smallest in reverse, and of equals the earlier row."""
    pool = examples([0.0, 0.0, 0.0, 9.0], gradient_norm=doubles(2, 5, 2, 1))
    assert GradientNorm().allocate(pool, 2).tolist() == [10, 12]
    assert GradientNorm(reverse=True).allocate(pool, 2).tolist() == [10, 16]


@pytest.mark.parametrize(
    ("keep", "budget", "ids"),
    [
        ("highest", 2, [14, 18]),
        ("lowest", 2, [10, 12]),
        ("middle", 1, [16]),
        ("middle", 2, [12, 16]),  # the lower of the two middles
        ("middle", 3, [12, 14, 16]),
        ("middle", 5, [10, 12, 14, 16, 18]),
    ],
)
def test_loss(keep: str, budget: int, ids: list[int]) -> None:
    """The losses 1 2 3 4 5, of the rows 10 12 16 14 18, are cut at the top, at the bottom, or evenly on both sides."""
    pool = examples([0.0] * 5, loss=doubles(1, 2, 4, 3, 5))
    assert Loss(keep).allocate(pool, budget).tolist() == ids  # type: ignore[arg-type]


def test_equal_losses() -> None:
    """Of equals the earlier row wins, at both ends."""
    pool = examples([0.0] * 4, loss=doubles(2, 2, 2, 2))
    assert Loss("highest").allocate(pool, 2).tolist() == Loss("lowest").allocate(pool, 2).tolist() == [10, 12]


def test_loss_refuses_what_it_does_not_know() -> None:
    """The message has the value and what it may be."""
    with pytest.raises(UserError, match="keeps the 'highest', the 'lowest' or the 'middle', not 'largest'"):
        Loss("largest")  # type: ignore[arg-type]


def test_less_ranks_by_the_cosine() -> None:
    """With φ_i = η/n <v, P g_i> the choice is that of the cosines, computed directly; of no gradient it is 0."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    steps *= torch.logspace(-3, 3, 40, dtype=torch.float64)[torch.randperm(40, generator=generator), None]
    steps[7] = 0
    v = torch.randn(6, generator=generator, dtype=torch.float64)
    cosines = torch.nn.functional.cosine_similarity(steps, v[None], dim=1, eps=1e-30)
    pool = examples((0.01 / 40 * steps @ v).tolist(), preconditioned_gradient_norm=steps.norm(dim=1))
    for budget in (1, 5, int((cosines > 0).sum()), int((cosines > 0).sum()) + 1, 39):
        expected = sorted((cosines.argsort(descending=True)[:budget] * 2 + 10).tolist())
        assert Less().allocate(pool, budget).tolist() == expected
    by_score = (pool.score.argsort(descending=True)[:5] * 2 + 10).sort().values
    assert Less().allocate(pool, 5).tolist() != by_score.tolist()


@pytest.mark.parametrize(
    ("allocator", "needs"),
    [
        (LongestResponse(), ()),
        (GradientNorm(), ("gradient_norm",)),
        (Loss(), ("loss",)),
        (Less(), ("preconditioned_gradient_norm",)),
    ],
)
def test_needs(allocator: DataAllocator, needs: tuple[str, ...]) -> None:
    """Each asks for what it uses, and is given as many examples as the budget says."""
    assert tuple(allocator.needs) == needs
    assert (allocator.unit, allocator.exact) == ("examples", True)
