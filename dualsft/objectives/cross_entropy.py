"""Cross-entropy of many logits: no further tensor of their size in forward, and only their gradient in backward.

    nll_t = log Σ_c exp z_{t, c} − z_{t, y_t},   ∂ nll_t / ∂ z_{t, c} = exp(z_{t, c} − z_{t, y_t} − nll_t) − [c = y_t]

``F.cross_entropy`` keeps log-probabilities, in float32 beside logits of half precision, and fills a gradient with zeros
on the way. Here some tokens at a time are taken to float32; the value of each is kept, and the gradient is written in
the logits' own type. On a CPU what is taken at a time stays in the cache.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

_AT_A_TIME = {"cpu": 2**22}
"""Bytes of float32 logits that are taken at a time, by type of device; on a GPU a launch should have much to do."""
_AT_A_TIME_ELSEWHERE = 2**26


def widened(logits: Float[Tensor, "*token vocabulary"]) -> Float[Tensor, "*token vocabulary"]:
    """The logits in float32 at least, whatever the model's type."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def cross_entropy(
    logits: Float[Tensor, "token vocabulary"], targets: Int[Tensor, " token"], kept: list[Tensor] | None = None
) -> Float[Tensor, " token"]:
    """The negative log-likelihood in nats of each token's target, in float32 at least; differentiable twice.

    Args:
        logits: In the model's type.
        targets: A class of each.
        kept: Empty, for the values to be kept in, or with those of an earlier call with the same logits, as where
            checkpointing computes them again.
    """
    nll: Tensor = _CrossEntropy.apply(logits, targets, [] if kept is None else kept)
    return nll


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, kept: list[Tensor]) -> Tensor:
        if not kept:
            kept.append(torch.empty(len(logits), dtype=widened(logits[:0]).dtype, device=logits.device))
            for where in _parts(logits):
                logp = F.log_softmax(widened(logits[where]), dim=1)
                torch.neg(logp.gather(1, targets[where, None])[:, 0], out=kept[0][where])
        ctx.save_for_backward(logits, targets, kept[0])
        return kept[0].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, nll = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated in turn
            again = F.cross_entropy(widened(logits), targets, reduction="none")
            return torch.autograd.grad(again, logits, grad, create_graph=True)[0], None, None
        found = torch.empty_like(logits)
        for where in _parts(logits):
            index, of_each, by = targets[where, None], nll[where, None], grad[where, None]
            part = torch.sub(logits[where], widened(logits[where].gather(1, index))).sub_(of_each).exp_().mul_(by)
            found[where] = part.scatter_(1, index, torch.expm1(-of_each) * by)
        return found, None, None


def _parts(logits: Float[Tensor, "token vocabulary"]) -> Iterator[slice]:
    """Slices of tokens that are taken at a time."""
    # what is traced for a plan has no cache, and each operation takes time
    device = "meta" if isinstance(logits, FakeTensor) else logits.device.type
    largest = _AT_A_TIME.get(device, _AT_A_TIME_ELSEWHERE)
    tokens = max(1, largest // (4 * logits.shape[1]))
    return (slice(first, first + tokens) for first in range(0, len(logits), tokens))
