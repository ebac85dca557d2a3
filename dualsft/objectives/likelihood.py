"""The loss of one example: l_i(θ) = mean negative log-likelihood over its supervised tokens."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from dualsft.data.layout import Batch, Layout
from dualsft.models import PreTrainedModel
from dualsft.objectives.chunks import Values, supervised_values, widened


def supervised_labels(labels: Int[Tensor, "row token"]) -> Int[Tensor, " supervised"]:
    """The labels of supervised tokens, row by row; a row's first token is none, as nothing predicts it."""
    following = labels[:, 1:]
    return following[following != -100]


def spread(values: Float[Tensor, " supervised"], supervised: Bool[Tensor, "row next"]) -> Float[Tensor, "row next"]:
    """Values of supervised tokens at their places; 0 elsewhere."""
    return torch.zeros(supervised.shape, dtype=values.dtype, device=values.device).masked_scatter(supervised, values)


def mean_over_tokens(
    values: Float[Tensor, " supervised"], supervised: Bool[Tensor, "row next"], layout: Layout
) -> Float[Tensor, " example"]:
    """The mean of values of supervised tokens over each example; 0 for an example without supervised tokens."""
    parts = spread(values, supervised), supervised.to(values.dtype)
    total, counted = (layout.by_example(F.pad(part, (1, 0))) for part in parts)
    return total.sum(1) / counted.sum(1).clamp(min=1)


def token_losses(
    logits: Float[Tensor, "row token vocabulary"], labels: Int[Tensor, "row token"]
) -> tuple[Float[Tensor, "row next"], Int[Tensor, "row next"]]:
    """Negative log-likelihood of each next token in nats (0 where unsupervised), and the labels used."""
    supervised = labels[:, 1:] != -100
    nll = F.cross_entropy(widened(logits[:, :-1][supervised]), supervised_labels(labels), reduction="none")
    return spread(nll, supervised), labels[:, 1:]


def supervised_losses(
    model: PreTrainedModel, batch: Batch, layout: Layout | None = None
) -> tuple[Float[Tensor, " supervised"], Bool[Tensor, "row next"]]:
    """Negative log-likelihood in nats of each supervised token, row by row, and which tokens but the first are."""
    return supervised_values(model, batch, _losses_of(batch), layout)


def example_losses(model: PreTrainedModel, batch: Batch, layout: Layout | None = None) -> Float[Tensor, " example"]:
    """l_i for each example of a padded or packed batch, in nats per supervised token; 0 for one without such tokens."""
    layout = layout or Layout.of(batch)
    return mean_over_tokens(*supervised_values(model, batch, _losses_of(batch), layout), layout)


def _losses_of(batch: Batch) -> Values:
    targets = supervised_labels(batch["labels"])
    return lambda logits, where: F.cross_entropy(widened(logits), targets[where], reduction="none")
