"""Cross-entropy is torch's, with its derivatives."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dualsft.objectives.cross_entropy import cross_entropy, widened

TOKENS, VOCABULARY = 40, 70_000
"""So many that they are taken several at a time."""


def draw(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets, and weights of the values."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(TOKENS, VOCABULARY, generator=generator, dtype=torch.float64)
    logits[0, 5], logits[1, :100] = 60, -torch.inf  # a certain token, and a vocabulary that is masked in part
    targets = torch.randint(100, VOCABULARY, (TOKENS,), generator=generator)
    targets[0] = 5
    return logits.to(dtype).requires_grad_(), targets, torch.randn(TOKENS, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 4e-6), (torch.bfloat16, 2**-8)]
)
def test_values_and_gradient_are_those_of_torch(dtype: torch.dtype, rounding: float) -> None:
    """Within rounding, and in the logits' own type."""
    logits, targets, weights = draw(dtype)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    (by_torch,) = torch.autograd.grad(expected, exact, weights)
    kept: list[Tensor] = []
    precision = 1e-12 if dtype == torch.float64 else 2e-6

    for _ in range(2):  # the second time from the values of the first, as in checkpointing
        nll = cross_entropy(logits, targets, kept)
        (gradient,) = torch.autograd.grad(nll, logits, weights.to(nll.dtype))

        assert nll.dtype == widened(logits).dtype
        torch.testing.assert_close(nll.double(), expected, rtol=precision, atol=precision)
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), by_torch, rtol=4 * rounding, atol=rounding * 1e-3)


def test_the_second_derivative_is_that_of_torch() -> None:
    """As a Hessian-vector product takes it."""
    logits, targets, weights = draw(torch.float64)
    along = torch.randn_like(logits)

    def product(nll: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(nll, logits, weights, create_graph=True)
        return torch.autograd.grad(gradient, logits, along)[0]

    expected = product(F.cross_entropy(logits, targets, reduction="none"))
    torch.testing.assert_close(product(cross_entropy(logits, targets)), expected, rtol=0, atol=0)


def test_a_logit_that_is_not_a_number_is_not_hidden() -> None:
    """The loss of its token, and of no other, is none either."""
    logits, targets, _ = draw(torch.float32)
    broken = logits.detach().index_put((torch.tensor(2), torch.tensor(7)), torch.tensor(torch.nan))

    assert cross_entropy(broken, targets).isnan().nonzero().flatten().tolist() == [2]
