"""The loss of one example: l_i(θ) = mean negative log-likelihood over its supervised tokens."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from dualsft.layout import Batch, Layout


def token_losses(
    logits: Float[Tensor, "row token vocabulary"], labels: Int[Tensor, "row token"]
) -> tuple[Float[Tensor, "row token-1"], Int[Tensor, "row token-1"]]:
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


def example_losses(model: PreTrainedModel, batch: Batch, layout: Layout | None = None) -> Float[Tensor, " example"]:
    """l_i for each example of the batch, in nats per supervised token; 0 for one without supervised tokens.

    Args:
        model: A causal language model.
        batch: Padded or packed examples. The first token of a packed example has no label, as no token before it is
            the example's own; without an attention mask the position ids keep packed examples apart.
        layout: The batch's, if it is at hand.
    """
    layout = layout or Layout.of(batch)
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    nll, targets = token_losses(model(**given, use_cache=False).logits, batch["labels"])
    counted = (targets != -100).to(nll.dtype)
    nll, counted = (layout.by_example(F.pad(values, (1, 0))) for values in (nll, counted))
    return nll.sum(1) / counted.sum(1).clamp(min=1)
