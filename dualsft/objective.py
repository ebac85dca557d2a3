"""The loss of one example: l_i(θ) = mean negative log-likelihood over its supervised tokens."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

Batch = dict[str, Tensor]
"""``example_id`` (example), ``input_ids``, ``attention_mask`` and ``labels`` (example, token), right-padded."""


def token_losses(
    logits: Float[Tensor, "example token vocabulary"], labels: Int[Tensor, "example token"]
) -> tuple[Float[Tensor, "example token-1"], Int[Tensor, "example token-1"]]:
    """Negative log-likelihood of each next token in nats (0 where unsupervised), and the labels it was taken at.

    The arithmetic is float32 whatever the logits' type (float64 stays), at the supervised positions alone: with a large
    vocabulary the logits are the largest tensor there is, and prompts need none.
    """
    targets = labels[:, 1:]
    supervised = targets != -100
    scores = logits[:, :-1][supervised]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    nll = F.cross_entropy(scores, targets[supervised], reduction="none")
    return torch.zeros(targets.shape, dtype=nll.dtype, device=nll.device).masked_scatter(supervised, nll), targets


def example_losses(model: PreTrainedModel, batch: Batch) -> Float[Tensor, " example"]:
    """l_i for each example of the batch, in nats per supervised token; 0 for one without supervised tokens."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    nll, targets = token_losses(logits, batch["labels"])
    return nll.sum(1) / (targets != -100).sum(1).clamp(min=1)
