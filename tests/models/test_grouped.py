"""Grouped products, and their derivatives, are those of a loop over the groups, whichever way they are computed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from dualsft.models import grouped
from dualsft.models.grouped import outer, product

SIZES = {"mixed": [3, 0, 4, 1], "all in one": [0, 0, 8, 0], "none at the ends": [0, 5, 3, 0]}


def ends_of(sizes: list[int]) -> Tensor:
    """The first row behind each group."""
    return torch.tensor(sizes).cumsum(0).int()


def random(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, float64, requires a gradient."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def slow_product(a: Tensor, weights: Tensor, sizes: list[int]) -> Tensor:
    """Group by group."""
    return torch.cat([part @ weights[g] for g, part in enumerate(a.split(sizes))])


def slow_outer(x: Tensor, y: Tensor, sizes: list[int]) -> Tensor:
    """Group by group."""
    return torch.stack([u.t() @ v for u, v in zip(x.split(sizes), y.split(sizes), strict=True)])


@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_those_of_a_loop(sizes: list[int], transposed: bool) -> None:
    """Both kinds, and their gradients, whichever way the weights lie in memory; a group without rows gets zeros."""
    a, x, y, ends = random(8, 5), random(8, 5, seed=1), random(8, 3, seed=2), ends_of(sizes)
    weights = random(4, 3, 5, seed=3).detach().mT if transposed else random(4, 5, 3, seed=3).detach()
    weights.requires_grad_()
    for fast, slow, inputs in ((product, slow_product, (a, weights)), (outer, slow_outer, (x, y))):
        found, expected = fast(*inputs, ends), slow(*inputs, sizes)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
        e = torch.randn_like(expected)
        for of, reference in zip(
            torch.autograd.grad(found, inputs, e), torch.autograd.grad(expected, inputs, e), strict=True
        ):
            torch.testing.assert_close(of, reference, rtol=1e-14, atol=1e-14)
    assert torch.autograd.grad(product(a, weights, ends).sum(), weights)[0].stride() == weights.stride()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
def test_products_have_all_derivatives(sizes: list[int]) -> None:
    """First and second derivatives, and those in forward mode, are those of finite differences."""
    ends = ends_of(sizes)
    for function, inputs in ((product, (random(8, 3), random(4, 3, 2))), (outer, (random(8, 3), random(8, 2)))):
        call: Callable[..., Tensor] = lambda x, y, function=function: function(x, y, ends)  # noqa: E731
        assert gradcheck(call, inputs, check_forward_ad=True)
        assert gradgradcheck(call, inputs)


@pytest.mark.parametrize(("width", "has_kernel"), [(16, True), (12, False)])
def test_the_kernel_is_taken_where_it_can_be(width: int, has_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 torch's kernel multiplies, unless it refuses the width; either is right but for rounding."""
    used, kernel = [], torch._grouped_mm

    def spoiling(x: Tensor, y: Tensor, offs: Tensor) -> Tensor:
        """As a device that leaves what is in memory in groups without rows."""
        used.append(x.shape)
        found = kernel(x, y, offs=offs)
        if y.dim() == 2:
            found[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return found

    monkeypatch.setattr(torch, "_grouped_mm", spoiling)
    monkeypatch.setattr(grouped, "_KERNEL_ON_CPU", True)
    sizes, inputs = SIZES["mixed"], (random(8, width), random(4, 24, width).detach().mT.requires_grad_())
    a, weights = half = [part.detach().bfloat16().requires_grad_() for part in inputs]
    found, expected = product(a, weights, ends_of(sizes)), slow_product(*inputs, sizes)
    e = torch.randn_like(expected)
    pairs = [
        (found, expected),
        *zip(torch.autograd.grad(found, half, e.bfloat16()), torch.autograd.grad(expected, inputs, e), strict=True),
    ]
    for of, reference in pairs:
        assert of.dtype == torch.bfloat16
        torch.testing.assert_close(of.double(), reference, rtol=0.0, atol=0.02 * float(reference.detach().abs().max()))
    assert len(used) == 3 * has_kernel


def test_the_kernel_is_given_aligned_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that begin elsewhere in a larger tensor, as slices may, and rows repeated without a copy, take the loop."""
    monkeypatch.delattr(torch, "_grouped_mm")
    sizes, weights = SIZES["mixed"], random(4, 16, 24).detach().bfloat16()
    rows = random(8 * 16 + 4).detach().bfloat16()
    for a in (rows[4:].view(8, 16), rows[:16].expand(8, 16)):
        expected = slow_product(a.double(), weights.double(), sizes)
        torch.testing.assert_close(product(a, weights, ends_of(sizes)).double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 12])
def test_products_can_be_traced(dtype: torch.dtype, width: int) -> None:
    """On tensors without values, forward and backward, in every type and width; operations are counted by shapes."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counted:
        a = torch.empty(8, width, dtype=dtype, requires_grad=True)
        weights = torch.empty(4, 24, width, dtype=dtype, requires_grad=True)
        y = product(a, weights.mT, torch.empty(4, dtype=torch.int32))
        y.backward(torch.empty(8, 24, dtype=dtype))
        assert y.shape == (8, 24)
        assert weights.grad is not None
        assert weights.grad.stride() == weights.stride()
    assert counted.get_total_flops() == 3 * 2 * 8 * width * 24
