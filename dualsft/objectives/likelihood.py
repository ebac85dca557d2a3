"""The loss of one example: l_i(θ) = mean negative log-likelihood over its supervised tokens."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from dualsft.data.layout import Batch, Layout
from dualsft.models import PreTrainedModel
from dualsft.objectives.inputs import model_inputs


def supervised_logits(
    logits: Float[Tensor, "row token vocabulary"], labels: Int[Tensor, "row token"]
) -> tuple[Float[Tensor, "supervised vocabulary"], Bool[Tensor, "row next"]]:
    """The logits that predict supervised tokens, and which tokens after each row's first are supervised.

    The logits are float32 at least, whatever the model's type, and of these positions alone: with a large vocabulary
    they are the largest tensor of all, and prompts need none.
    """
    supervised = labels[:, 1:] != -100
    scores = logits[:, :-1][supervised]
    return scores.to(torch.promote_types(scores.dtype, torch.float32)), supervised


def mean_over_tokens(
    values: Float[Tensor, " supervised"], supervised: Bool[Tensor, "row next"], layout: Layout
) -> Float[Tensor, " example"]:
    """The mean of values of supervised tokens over each example; 0 for an example without supervised tokens."""
    spread = torch.zeros(supervised.shape, dtype=values.dtype, device=values.device).masked_scatter(supervised, values)
    total, counted = (layout.by_example(F.pad(part, (1, 0))) for part in (spread, supervised.to(values.dtype)))
    return total.sum(1) / counted.sum(1).clamp(min=1)


def token_losses(
    logits: Float[Tensor, "row token vocabulary"], labels: Int[Tensor, "row token"]
) -> tuple[Float[Tensor, "row next"], Int[Tensor, "row next"]]:
    """Negative log-likelihood of each next token in nats (0 where unsupervised), and the labels used."""
    scores, supervised = supervised_logits(logits, labels)
    nll = F.cross_entropy(scores, labels[:, 1:][supervised], reduction="none")
    spread = torch.zeros(supervised.shape, dtype=nll.dtype, device=nll.device).masked_scatter(supervised, nll)
    return spread, labels[:, 1:]


def supervised_losses(model: PreTrainedModel, batch: Batch) -> Float[Tensor, " supervised"]:
    """Negative log-likelihood in nats of each supervised token of a padded or packed batch, row by row."""
    scores, supervised = supervised_logits(model(**model_inputs(model, batch)).logits, batch["labels"])
    return F.cross_entropy(scores, batch["labels"][:, 1:][supervised], reduction="none")


def example_losses(model: PreTrainedModel, batch: Batch, layout: Layout | None = None) -> Float[Tensor, " example"]:
    """l_i for each example of a padded or packed batch, in nats per supervised token; 0 for one without such tokens."""
    scores, supervised = supervised_logits(model(**model_inputs(model, batch)).logits, batch["labels"])
    nll = F.cross_entropy(scores, batch["labels"][:, 1:][supervised], reduction="none")
    return mean_over_tokens(nll, supervised, layout or Layout.of(batch))
