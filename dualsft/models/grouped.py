"""Products of sorted rows with the matrix of each row's group, as those of tokens with the weights of their experts.

    product    y_r = a_r W_g for the rows r of group g
    outer      S_g = Σ_r x_rᵀ y_r over the rows r of group g

The rows of group g are those from ends[g - 1] to ends[g]; a group may have none. The gradients of either are such
products again, so that both can be differentiated any number of times, and in forward mode.

In bfloat16 torch has a kernel that takes one launch for all groups and does not tell the host their sizes. Any other
type, and what the kernel refuses, takes a loop over the groups, for which the host reads their sizes.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

_ALIGNMENT = 16
"""Bytes of which the kernel wants the widths of rows and matrices, and where they begin, to be a multiple."""

_KERNEL_ON_CPU = torch.__version__ >= "2.11"
"""Earlier ones want aligned memory too, which weights mapped from a file lack."""


def product(
    a: Float[Tensor, "row m"], weights: Float[Tensor, "group m n"], ends: Int[Tensor, " group"]
) -> Float[Tensor, "row n"]:
    """y_r = a_r W_g, differentiable; all of one type. ``ends`` is int32."""
    found: Tensor = _Product.apply(a, weights, ends)
    return found


def outer(
    x: Float[Tensor, "row m"], y: Float[Tensor, "row n"], ends: Int[Tensor, " group"]
) -> Float[Tensor, "group m n"]:
    """S_g = Σ_r x_rᵀ y_r, zero of a group without rows, differentiable; both of one type. ``ends`` is int32."""
    found: Tensor = _Outer.apply(x, y, ends)
    return found


def placed(ends: Int[Tensor, " group"], dtype: torch.dtype) -> Int[Tensor, " group"]:
    """Where products of this type want ``ends``: on the host if they take the loop, so that it waits once for many."""
    return ends if dtype == torch.bfloat16 else ends.cpu()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        return _grouped(a, weights, ends)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (e,) = grads
        a, weights, ends = ctx.saved_tensors
        of_a = product(e, weights.mT, ends) if ctx.needs_input_grad[0] else None
        of_weights = None
        if ctx.needs_input_grad[1]:  # laid out as the weights are, or autograd would copy it
            of_weights = outer(e, a, ends).mT if weights.mT.is_contiguous() else outer(a, e, ends)
        return of_a, of_weights, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        a, weights, ends = ctx.saved_tensors
        of_a, of_weights, _ = tangents
        return product(of_a, weights, ends) + product(a, of_weights, ends)


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
        return _grouped(x.t(), y, ends)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (sums,) = grads
        x, y, ends = ctx.saved_tensors
        of_x = product(y, sums.mT, ends) if ctx.needs_input_grad[0] else None
        return of_x, product(x, sums, ends) if ctx.needs_input_grad[1] else None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        x, y, ends = ctx.saved_tensors
        of_x, of_y, _ = tangents
        return outer(of_x, y, ends) + outer(x, of_y, ends)


def _grouped(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """The product of (row, m) and (group, m, n), or of (m, row) and (row, n) for each group."""
    found: Tensor
    if not (_has_kernel(x) and _has_kernel(y)):
        found = torch.ops.dualsft.grouped_loop(x, y, ends)
        return found
    found = torch._grouped_mm(x, y, offs=ends)
    if y.dim() == 2:  # some devices leave a group without rows as it was allocated (pytorch/pytorch#172439)
        sizes = ends.diff(prepend=ends.new_zeros(1))
        found.masked_fill_((sizes == 0).view(-1, 1, 1), 0)
    return found


def _has_kernel(part: Tensor) -> bool:
    """Whether torch has a kernel for products with this tensor."""
    if part.dtype != torch.bfloat16 or not _device_has_kernel(part.device):
        return False
    across = [stride for stride in part.stride()[-2:] if stride != 1]
    distances = [part.element_size() * entries for entries in (part.storage_offset(), *across)]
    return len(across) == 1 and across[0] > 0 and not any(distance % _ALIGNMENT for distance in distances)


def _device_has_kernel(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "meta" or (device.type == "cpu" and _KERNEL_ON_CPU)


@torch.library.custom_op("dualsft::grouped_loop", mutates_args=())
def _loop(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """`_grouped` by a loop; an operation of its own, so that one without values can stand in for it."""
    found, first = _empty(x, y, ends), 0
    for group, last in enumerate(ends.tolist()):
        rows = slice(first, last)
        if y.dim() == 3:
            torch.mm(x[rows], y[group], out=found[rows])
        else:
            torch.mm(x[:, rows], y[rows], out=found[group])
        first = last
    return found


@_loop.register_fake
def _empty(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    groups = () if y.dim() == 3 else (len(ends),)
    return x.new_empty((*groups, x.shape[0], y.shape[-1]))


def _flops(x: tuple[int, ...], y: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Multiplications and additions of `_grouped`, from the shapes, for torch's counter."""
    return 2 * x[0] * x[1] * y[-1]


for _operation in (torch.ops.dualsft.grouped_loop, torch.ops.aten._grouped_mm):
    if _operation not in flop_registry:  # as the second may be in a release to come
        register_flop_formula(_operation)(_flops)
