"""Replaces the backward of a linear layer, y = a Wᵀ + b: the output is kept, with another graph behind it.

For Linear, and for Conv1D, whose weight is Wᵀ.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether this module computes a Wᵀ + b, from a weight and a bias of its own, and nothing else."""
    plain = type(module) in (nn.Linear, Conv1D) and "forward" not in vars(module)
    return plain and {n for n, _ in module.named_parameters(recurse=False)} <= {"weight", "bias"}


@runtime_checkable
class LinearBackward(Protocol):
    """A replacement for a linear layer's backward; the gradient of the bias is computed as usual."""

    def backward(
        self, e: Tensor, a: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of the input, the weight and the additional tensor; None where one is not needed.

        Args:
            e: The gradient of the output.
            a: The input.
            weight: The module's weight: W, or Wᵀ for Conv1D.
            needs: Which of the three gradients are needed.
        """


def exchange(
    module: nn.Module, a: Tensor, output: Tensor, other: Tensor, behind: LinearBackward, *, weight_too: bool
) -> Tensor:
    """Return the output of a layer with input a, with its backward replaced.

    The other tensor gets a gradient too; it makes autograd call the backward even if nothing else does. A weight that
    requires a gradient gets it from this backward if ``weight_too``.
    """
    layer: Any = module
    weight = layer.weight if weight_too else layer.weight.detach()
    exchanged: Tensor = _Exchanged.apply(output.detach(), a, weight, layer.bias, other, behind)
    return exchanged


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, a: Tensor, weight: Tensor, *others: Any) -> Tensor:
        *_, ctx.behind = others  # the bias and the additional tensor are inputs so that they get gradients
        ctx.save_for_backward(a, weight)
        return output.detach()  # not a view, which the model could not modify in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (e,) = grads
        a, weight = ctx.saved_tensors
        _, needs_input, needs_weight, needs_bias, needs_other, _ = ctx.needs_input_grad
        with torch.autocast(e.device.type, enabled=False):
            needs = (needs_input, needs_weight, needs_other)
            of_input, of_weight, of_other = ctx.behind.backward(e, a, weight, needs)
            of_bias = e.reshape(-1, e.shape[-1]).sum(0) if needs_bias else None
        return None, of_input, of_weight, of_bias, of_other, None
