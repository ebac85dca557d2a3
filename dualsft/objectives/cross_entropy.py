"""Cross-entropy of many logits: no further tensor of their size in forward, and only their gradient in backward.

    nll_t = lse_t − z_{t, y_t},  lse_t = log Σ_c exp z_{t, c},  ∂ nll_t / ∂ z_{t, c} = exp(z_{t, c} − lse_t) − [c = y_t]

``F.cross_entropy`` keeps log-probabilities, in float32 beside logits of half precision, and fills a gradient with zeros
on the way. Here some tokens at a time are taken to float32; a log-sum-exp is kept of each, and the gradient is written
in the logits' own type. On a CPU what is taken at a time stays in the cache.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

_AT_A_TIME = {"cpu": 2**22}
"""Bytes of float32 logits that are taken at a time, by type of device; on a GPU a launch should have much to do."""
_AT_A_TIME_ELSEWHERE = 2**26


def widened(logits: Float[Tensor, "*token vocabulary"]) -> Float[Tensor, "*token vocabulary"]:
    """The logits in float32 at least, whatever the model's type."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def cross_entropy(
    logits: Float[Tensor, "token vocabulary"], targets: Int[Tensor, " token"], lse: list[Tensor] | None = None
) -> Float[Tensor, " token"]:
    """The negative log-likelihood in nats of each token's target, in float32 at least; differentiable twice.

    Args:
        logits: In the model's type.
        targets: A class of each.
        lse: Empty, for the log-sum-exps to be kept in, or with those of an earlier call, as where checkpointing has
            the same logits computed again: then the values are only as exact as a difference of two logits.
    """
    nll: Tensor = _CrossEntropy.apply(logits, targets, [] if lse is None else lse)
    return nll


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, lse: list[Tensor]) -> Tensor:
        at_target = widened(logits.gather(1, targets[:, None]))[:, 0]
        if lse:
            nll = lse[0] - at_target
        else:
            nll = torch.empty_like(at_target)
            for where in _parts(logits):
                logp = F.log_softmax(widened(logits[where]), dim=1)
                torch.neg(logp.gather(1, targets[where, None])[:, 0], out=nll[where])
            lse.append(nll + at_target)
        ctx.save_for_backward(logits, targets, lse[0])
        return nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated in turn
            nll = F.cross_entropy(widened(logits), targets, reduction="none")
            return torch.autograd.grad(nll, logits, grad, create_graph=True)[0], None, None
        found = torch.empty_like(logits)
        for where in _parts(logits):
            index, by = targets[where, None], grad[where, None]
            part = torch.sub(logits[where], lse[where, None]).exp_().mul_(by)
            found[where] = part.scatter_(1, index, part.gather(1, index) - by)
        return found, None, None


def _parts(logits: Float[Tensor, "token vocabulary"]) -> Iterator[slice]:
    """Slices of tokens that are taken at a time."""
    largest = _AT_A_TIME.get(logits.device.type, _AT_A_TIME_ELSEWHERE)
    tokens = max(1, largest // (4 * logits.shape[1]))
    return (slice(first, first + tokens) for first in range(0, len(logits), tokens))
