"""The loss of a training step, with l_it the negative log-likelihood of the t-th of example i's T_i tokens.

    example_mean    mean over the n examples of a batch:         1/n Σ_i 1/T_i Σ_t l_it
    token_mean      mean over all tokens of the step's batches:  1/T Σ_i Σ_t l_it,  T = Σ_i T_i

Tokens are supervised ones throughout. With gradient accumulation a step has several batches, the last of an epoch
perhaps fewer. Their example means are averaged, each batch weighing the same; their token means are averaged with
weights, the batches' tokens. How much all batches of a step weigh is known only at its last one. So a batch's weighted
loss is divided by the weight of the step's first batch, and the accumulated gradient is multiplied by the correcting
factor before it is clipped.

On several ranks n and T count all ranks, and each rank sums over its own rows; gradients are summed over ranks.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dualsft.data.dealing import extent_of
from dualsft.data.layout import Batch
from dualsft.models import PreTrainedModel
from dualsft.objectives import example_losses, supervised_losses
from dualsft.sharding.collectives import all_reduce_sum, sum_of_shards
from dualsft.sharding.local_batch import local_rows

Loss = Literal["example_mean", "token_mean"]


class StepLoss:
    """The loss over the batches of a step, whose gradients are accumulated: a mean over examples or over tokens."""

    def __init__(self, kind: Loss) -> None:
        self._kind = kind
        self._first = self._total = 0

    def begin(self, batch: Batch, is_first: bool) -> float:
        """Count a batch in: how much it weighs in its step, in units of the step's first batch.

        The first batch of a step begins anew: gradients that no step has used, as of an epoch that was broken off, have
        been dropped.
        """
        weight = 1 if self._kind == "example_mean" else extent_of(batch).supervised
        if is_first:
            self._first = self._total = 0
        self._first = self._first or weight
        self._total += weight
        return weight / self._first

    def of(self, model: PreTrainedModel, batch: Batch) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """(a batch's own mean, this rank's share of it), the latter to be differentiated by the batch's weight."""
        own = local_rows(batch)
        if self._kind == "example_mean":
            losses, count = example_losses(model, own).sum(), len(extent_of(batch).ids)
        else:
            losses, count = supervised_losses(model, own).sum(), extent_of(batch).supervised
        return all_reduce_sum(losses.detach()) / count, losses / count

    @torch.no_grad()
    def finish(self, parameters: Iterable[Tensor], accumulated: int) -> None:
        """End the step: rescale the gradients, whose losses were divided by ``accumulated``, to the step's loss."""
        factor = accumulated * self._first / self._total
        self._first = self._total = 0
        for parameter in parameters if factor != 1 else ():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def state(self) -> dict[str, int]:
        """The weights of the batches of an unfinished step: of the first, and of all of them."""
        return {"first": self._first, "total": self._total}

    def restore(self, state: dict[str, int]) -> None:
        """Continue a step from an earlier `state`."""
        self._first, self._total = state["first"], state["total"]


@torch.no_grad()
def clip_norm(parameters: list[Tensor], limit: float) -> None:
    """Bring the gradients' norm over all shards down to a limit, as `torch.nn.utils.clip_grad_norm_` does on one."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    norm = sum_of_shards(torch.stack(norms).square().sum()).sqrt()
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm.to(gradients[0].dtype))
