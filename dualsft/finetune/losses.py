"""The loss of a training step, with l_it the negative log-likelihood of the t-th of example i's T_i tokens.

    example_mean    mean over the n examples of a batch:         1/n Σ_i 1/T_i Σ_t l_it
    token_mean      mean over all tokens of the step's batches:  1/T Σ_i Σ_t l_it,  T = Σ_i T_i

Tokens are supervised ones throughout. With gradient accumulation a step has several batches. Their example means are
averaged, each batch weighing the same. Their token means would not add up to the step's, as batches differ in tokens,
and a step's number of tokens is known only at its last batch. So a batch's sum is divided by the tokens of the step's
first batch, and the accumulated gradient is multiplied by the correcting factor before it is clipped.

On several ranks n and T count all ranks, and each rank sums over its own rows; gradients are summed over ranks.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dualsft.data.layout import Batch
from dualsft.models import PreTrainedModel
from dualsft.objectives import example_losses, supervised_losses
from dualsft.sharding.collectives import all_reduce_sum
from dualsft.sharding.local_batch import local_rows

Loss = Literal["example_mean", "token_mean"]


class StepLoss:
    """The loss over the batches of a step, whose gradients are accumulated: a mean over examples or over tokens."""

    def __init__(self, kind: Loss) -> None:
        self._kind = kind
        self._first = self._tokens = 0

    def of(self, model: PreTrainedModel, batch: Batch) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """(the batch's own mean, this rank's share of the loss to differentiate for the step)."""
        own = local_rows(batch)
        if self._kind == "example_mean":
            share = example_losses(model, own).sum() / len(batch["example_id"])
            return all_reduce_sum(share.detach()), share
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        self._first = self._first or tokens
        self._tokens += tokens
        losses = supervised_losses(model, own).sum()
        return all_reduce_sum(losses.detach()) / tokens, losses / self._first

    @torch.no_grad()
    def finish(self, parameters: Iterable[Tensor], accumulated: int) -> None:
        """End the step: rescale the gradients, whose losses were divided by ``accumulated``, to the step's loss."""
        if self._kind == "example_mean":
            return
        factor = accumulated * self._first / self._tokens
        self._first = self._tokens = 0
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def state(self) -> dict[str, int]:
        """The tokens of an unfinished step."""
        return {"first": self._first, "tokens": self._tokens}

    def restore(self, state: dict[str, int]) -> None:
        """Continue a step from an earlier `state`."""
        self._first, self._tokens = state["first"], state["tokens"]


@torch.no_grad()
def clip_norm(parameters: list[Tensor], limit: float) -> None:
    """Bring the gradients' norm over all ranks down to a limit, as `torch.nn.utils.clip_grad_norm_` does on one."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    norm = all_reduce_sum(torch.stack(norms).square().sum()).sqrt()
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm.to(gradients[0].dtype))
