"""The prior term, which keeps the model near the base model: confidence-weighted self-distillation.

    prior(θ) = mean_i  τ² w_i KL_i,     KL_i = mean_t KL( p_old(· | t) ‖ p_θ(· | t) ) at temperature τ

over some examples of the pool, with p_old the untouched base model and t the supervised tokens of example i. The
confidence w_i is 1 (uniform), the mean over t of the base model's largest probability (max_prob), or 1 / (1 + its mean
entropy in nats) (entropy_inv), both at temperature 1. Source: arXiv 2605.06166.

At the base model itself the gradient is zero, as the divergence is smallest there, but its curvature is not.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dualsft.data.layout import Batch, Layout
from dualsft.errors import UserError
from dualsft.models import PreTrainedModel
from dualsft.objectives.base import Objective
from dualsft.objectives.base_logits import BaseLogits
from dualsft.objectives.chunks import supervised_values, tokens_at_once
from dualsft.objectives.cross_entropy import widened
from dualsft.objectives.likelihood import mean_over_tokens
from dualsft.objectives.supervised import Supervised

Confidence = Literal["uniform", "max_prob", "entropy_inv"]
CONFIDENCES = ("uniform", "max_prob", "entropy_inv")


def check_prior(key: str, weight: float, temperature: float, confidence: str) -> None:
    """Check what a prior term is made with, which the options under this key gave.

    Raises:
        UserError: if one of them is out of range.
    """
    if not 0 <= weight < math.inf:
        raise UserError(f"{key}.weight is {weight}; give 0 (no prior term) or a positive number.")
    if not 0 < temperature < math.inf:
        raise UserError(f"{key}.temperature is {temperature}; give a positive number.")
    if confidence not in CONFIDENCES:
        raise UserError(f"{key}.confidence is {confidence!r}; give one of {', '.join(CONFIDENCES)}.")


class SelfDistillation(Objective):
    """The prior term: the divergence of the model from the base model on a random part of the pool.

    Args:
        weight: λ_prior, beside the validation loss's 1.
        fraction: Share of the pool that the mean is over.
        temperature: τ, by which both models' logits are divided.
        confidence: How w_i depends on the base model.
    """

    name: ClassVar[str] = "prior"
    needs_teacher: ClassVar[bool] = True

    def __init__(self, weight: float, fraction: float, temperature: float, confidence: Confidence) -> None:
        self.weight, self.fraction, self.temperature, self.confidence = weight, fraction, temperature, confidence

    def draw(self, pool: Sequence[int], seed: int) -> list[int]:
        """A random fraction of the pool, at least one example, in source order; drawn independently of the warm-up."""
        count = max(1, round(self.fraction * len(pool)))
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed + 1))
        return [pool[k] for k in sorted(order[:count].tolist())]

    def losses(
        self, model: PreTrainedModel, batch: Batch, layout: Layout, teacher: PreTrainedModel | None
    ) -> Float[Tensor, " example"]:
        """τ² w_i KL_i of each example, in nats per supervised token."""
        assert teacher is not None
        return self.divergences(model, batch, layout, BaseLogits(teacher, batch))

    def divergences(
        self, model: PreTrainedModel, batch: Batch, layout: Layout, old: BaseLogits
    ) -> Float[Tensor, " example"]:
        """The same, given the base model's logits at the batch's supervised tokens."""

        def divergence(logits: Tensor, where: slice, _: object) -> Tensor:
            p_old = F.softmax(widened(old.at(where, logits.device)) / self.temperature, dim=1)
            crossed = F.cross_entropy(widened(logits) / self.temperature, p_old, reduction="none")
            return crossed - torch.special.entr(p_old).sum(1)

        supervised = Supervised.of(batch)
        found = supervised_values(model, batch, supervised, divergence, layout)
        with torch.no_grad():
            parts = [
                self._certainty(widened(old.at(where, found.device))) for where in old.chunks(tokens_at_once(model))
            ]
            weights = mean_over_tokens(torch.cat(parts), supervised, layout)
        if self.confidence == "entropy_inv":
            weights = 1 / (1 + weights)
        return self.temperature**2 * weights * mean_over_tokens(found, supervised, layout)

    def _certainty(self, logits: Float[Tensor, "token vocabulary"]) -> Float[Tensor, " token"]:
        """What the mean over an example's tokens is taken of, for its confidence."""
        if self.confidence == "uniform":
            return torch.ones_like(logits[:, 0])
        logp = F.log_softmax(logits, dim=1)
        return logp.amax(1).exp() if self.confidence == "max_prob" else torch.special.entr(logp.exp()).sum(1)
