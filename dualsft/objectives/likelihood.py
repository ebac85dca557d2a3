"""The loss of one example: l_i(θ) = mean negative log-likelihood over its supervised tokens."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dualsft.data.layout import Batch, Layout
from dualsft.models import PreTrainedModel
from dualsft.objectives.chunks import KEPT, Values, supervised_values
from dualsft.objectives.cross_entropy import cross_entropy
from dualsft.objectives.supervised import Supervised


def mean_over_tokens(
    values: Float[Tensor, " supervised"], supervised: Supervised, layout: Layout
) -> Float[Tensor, " example"]:
    """The mean of values of supervised tokens over each example; 0 for an example without supervised tokens."""
    parts = supervised.spread(values), supervised.spread(torch.ones_like(values))
    total, counted = (layout.by_example(part) for part in parts)
    return total.sum(1) / counted.sum(1).clamp(min=1)


def token_losses(
    logits: Float[Tensor, "row token vocabulary"], labels: Int[Tensor, "row token"]
) -> tuple[Float[Tensor, "row next"], Int[Tensor, "row next"]]:
    """Negative log-likelihood of each next token in nats (0 where unsupervised), and the labels used."""
    supervised = Supervised.of({"labels": labels})
    nll = cross_entropy(supervised.pick(logits), supervised.targets)
    return supervised.spread(nll)[:, 1:], labels[:, 1:]


def supervised_losses(model: PreTrainedModel, batch: Batch) -> Float[Tensor, " supervised"]:
    """Negative log-likelihood in nats of each supervised token, row by row."""
    supervised = Supervised.of(batch)
    return supervised_values(model, batch, supervised, _losses_of(supervised), kept=KEPT)


def example_losses(model: PreTrainedModel, batch: Batch, layout: Layout | None = None) -> Float[Tensor, " example"]:
    """l_i for each example of a padded or packed batch, in nats per supervised token; 0 for one without such tokens."""
    layout, supervised = layout or Layout.of(batch), Supervised.of(batch)
    values = supervised_values(model, batch, supervised, _losses_of(supervised), layout, KEPT)
    return mean_over_tokens(values, supervised, layout)


def _losses_of(supervised: Supervised) -> Values:
    targets = supervised.targets
    return lambda logits, where, kept: cross_entropy(logits, targets[where], kept)
