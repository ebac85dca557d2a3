"""The slow obvious reference of the prior: one example, one token at a time, straight from the formula."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dualsft.selection.prior import Prior
from tests.selection.tiny import Example


def slow_prior(model: PreTrainedModel, teacher: PreTrainedModel, example: Example, prior: Prior) -> Tensor:
    """τ² w KL of one unpadded example, in the models' own type, differentiable as often as the model is."""
    ids, labels = example
    new = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    with torch.no_grad():
        old = teacher(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    divergences, largest, entropies = [], [], []
    for t, label in enumerate(labels[1:]):
        if label == -100:
            continue
        p_old = torch.log_softmax(old[t] / prior.temperature, 0)
        p_new = torch.log_softmax(new[t] / prior.temperature, 0)
        divergences.append((p_old.exp() * (p_old - p_new)).sum())
        sure = torch.log_softmax(old[t], 0)
        largest.append(sure.exp().max())
        entropies.append(-(sure.exp() * sure).sum())
    if not divergences:
        return new.sum() * 0
    confidence = {
        "uniform": torch.ones(()),
        "max_prob": torch.stack(largest).mean(),
        "entropy_inv": 1 / (1 + torch.stack(entropies).mean()),
    }
    return prior.temperature**2 * confidence[prior.confidence] * torch.stack(divergences).mean()
