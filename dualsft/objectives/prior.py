"""The prior term, which keeps what the base model knew: confidence-weighted self-distillation.

    prior(θ) = mean_i  τ² w_i KL_i,     KL_i = mean_t KL( p_old(· | t) ‖ p_θ(· | t) ) at temperature τ

over an anchor subset of the pool, with p_old the untouched base model and t the supervised tokens of example i. The
confidence w_i is 1 (uniform), the mean over t of the base model's largest probability (max_prob), or 1 / (1 + its mean
entropy in nats) (entropy_inv), both at temperature 1. Source: arXiv 2605.06166.

At the base model itself the gradient is zero, as the divergence is smallest there, but its curvature is not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from dualsft.data.layout import Batch, Layout
from dualsft.errors import UserError
from dualsft.objectives.base import Objective
from dualsft.objectives.likelihood import mean_over_tokens, supervised_logits

Confidence = Literal["uniform", "max_prob", "entropy_inv"]
_CONFIDENCES = ("uniform", "max_prob", "entropy_inv")


@dataclass(frozen=True)
class Prior:
    """The prior term of the objective.

    Args:
        weight: λ_prior, beside the validation loss's 1; 0 is none, the paper's release has 0.2.
        fraction: Share of the pool that anchors the model, drawn at random.
        temperature: τ, by which both models' logits are divided.
        confidence: How much an anchor counts: the same each (uniform), by the base model's largest probability
            (max_prob), or less the more uncertain the base model is (entropy_inv).
    """

    weight: float = 0.0
    fraction: float = 0.02
    temperature: float = 2.0
    confidence: Confidence = "max_prob"

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise UserError(f"model.prior.weight is {self.weight}; give 0 (no prior term) or a positive number.")
        if not 0 < self.fraction <= 1:
            raise UserError(f"model.prior.fraction is {self.fraction}; give a share above 0 and up to 1.")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"model.prior.temperature is {self.temperature}; give a positive number.")
        if self.confidence not in _CONFIDENCES:
            raise UserError(f"model.prior.confidence is {self.confidence!r}; give one of {', '.join(_CONFIDENCES)}.")


class SelfDistillation(Objective):
    """The prior term as passes run over it.

    Args:
        prior: Its settings.
    """

    name: ClassVar[str] = "prior"
    needs_teacher: ClassVar[bool] = True

    def __init__(self, prior: Prior) -> None:
        self.prior, self.weight = prior, prior.weight

    def draw(self, pool: Sequence[int], seed: int) -> list[int]:
        """This fraction of the pool (at least one), at random, in source order; not the draw of the warm-up."""
        count = max(1, round(self.prior.fraction * len(pool)))
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed + 1))
        return [pool[k] for k in sorted(order[:count].tolist())]

    def losses(
        self, model: PreTrainedModel, batch: Batch, layout: Layout, teacher: PreTrainedModel | None
    ) -> Float[Tensor, " example"]:
        """τ² w_i KL_i of each example, in nats per supervised token."""
        assert teacher is not None
        temperature = self.prior.temperature
        with torch.no_grad():
            old, supervised = supervised_logits(teacher, batch)
            p_old = F.softmax(old / temperature, dim=1)
            weights = self._weights(old, supervised, layout)
            entropy = torch.special.entr(p_old).sum(1)
            del old
        new, _ = supervised_logits(model, batch)
        divergence = F.cross_entropy(new.div_(temperature), p_old, reduction="none") - entropy
        return temperature**2 * weights * mean_over_tokens(divergence, supervised, layout)

    def _weights(
        self, logits: Float[Tensor, "supervised vocabulary"], supervised: Bool[Tensor, "row next"], layout: Layout
    ) -> Float[Tensor, " example"]:
        if self.prior.confidence == "uniform":
            return mean_over_tokens(torch.ones_like(logits[:, 0]), supervised, layout)
        logp = F.log_softmax(logits, dim=1)
        if self.prior.confidence == "max_prob":
            return mean_over_tokens(logp.amax(1).exp(), supervised, layout)
        return 1 / (1 + mean_over_tokens(torch.special.entr(logp.exp()).sum(1), supervised, layout))
