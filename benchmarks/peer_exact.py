"""Exact first-order scores for `benchmarks/peers.py`: float64 autograd, one example at a time, nothing batched."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from peer_work import Tokens, Work
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional import spearman_corrcoef

from dualsft.models import PreTrainedModel
from dualsft.models.loading import load_model

Gradient = dict[str, Tensor]


class ExactScores:
    """<mean validation gradient, gradient of the example's loss> over any set of parameters, for either loss.

    Args:
        model: Folder of the model.
        work: Whose pool to score, and whose validation rows to score it for.
    """

    def __init__(self, model: Path, work: Work) -> None:
        loaded = load_model(str(model), "float64").eval()
        self.sizes = {name: p.numel() for name, p in loaded.named_parameters()}
        self._by_parameter = {reduction: _products(loaded, work, loss) for reduction, loss in LOSSES.items()}

    def of(self, reduction: str, names: Iterable[str] | None = None) -> Tensor:
        """The scores over these parameters, or over all, for the ``mean`` or the ``sum`` over tokens."""
        found = self._by_parameter[reduction]
        return torch.stack([found[name] for name in (self.sizes if names is None else names)]).sum(0)


def mean_loss(model: PreTrainedModel, example: dict[str, list[int]]) -> Tensor:
    """The mean negative log-likelihood of an example's supervised tokens."""
    return _loss(model, example, "mean")


def summed_loss(model: PreTrainedModel, example: dict[str, list[int]]) -> Tensor:
    """The sum of the same."""
    return _loss(model, example, "sum")


def _loss(model: PreTrainedModel, example: dict[str, list[int]], reduction: str) -> Tensor:
    inputs, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
    return F.cross_entropy(model(input_ids=inputs).logits[0, :-1], labels[1:], reduction=reduction)


LOSSES: dict[str, Callable[[PreTrainedModel, dict[str, list[int]]], Tensor]] = {"mean": mean_loss, "sum": summed_loss}


def _products(model: PreTrainedModel, work: Work, loss: Callable[..., Tensor]) -> Gradient:
    """Parameter name -> its part of each example's score."""
    asked = _mean_gradient(model, work.tokens("validation"), loss)
    rows = []
    for example in work.tokens("pool"):
        gradient = _gradient(model, loss(model, example))
        rows.append({name: (gradient[name] * asked[name]).sum() for name in asked})
    return {name: torch.stack([row[name] for row in rows]) for name in asked}


def _mean_gradient(model: PreTrainedModel, examples: Tokens, loss: Callable[..., Tensor]) -> Gradient:
    total: Gradient = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for example in examples:
        for name, part in _gradient(model, loss(model, example)).items():
            total[name] += part / len(examples)
    return total


def _gradient(model: PreTrainedModel, loss: Tensor) -> Gradient:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def cosine(found: Tensor, exact: Tensor) -> float:
    """The cosine of two score vectors."""
    return float(F.cosine_similarity(found.double(), exact.double(), dim=0))


def spearman(found: Tensor, exact: Tensor) -> float:
    """The rank correlation of two score vectors."""
    return float(spearman_corrcoef(found.double(), exact.double()))
