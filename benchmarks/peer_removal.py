"""The retraining of `benchmarks/peers.py`: what the held-out target loss does when the best rows are taken away."""

import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peer_work import Tokens, Work
from torch import Tensor
from torch.nn import functional as F

from dualsft.experiments.bootstrap import t_quantile
from dualsft.models import PreTrainedModel
from dualsft.models.loading import load_model


@dataclass(frozen=True)
class Training:
    """Plain AdamW over all weights, the same for every set of rows.

    Attributes:
        steps: Optimizer steps.
        batch: Examples of a step; the loss is the mean over them of the mean over each one's tokens.
        rate: Constant learning rate.
    """

    steps: int
    batch: int
    rate: float


def count(rows: int, share: float) -> int:
    """How many rows a share is; at least one."""
    return max(1, round(share * rows))


def highest(scores: Tensor, share: float) -> set[int]:
    """The rows with the highest scores, this share of all."""
    return set(scores.topk(count(len(scores), share)).indices.tolist())


def drawn(rows: int, share: float, seed: int) -> set[int]:
    """As many rows at random."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1000 + seed))
    return set(order[: count(rows, share)].tolist())


def batches(rows: int, removed: set[int], training: Training, seed: int) -> Iterator[list[int]]:
    """The rows of each step: the pool's order under the seed, without what was removed, as often as it takes."""
    generator, waiting = torch.Generator().manual_seed(seed), list[int]()
    for _ in range(training.steps):
        while len(waiting) < training.batch:
            waiting += [i for i in torch.randperm(rows, generator=generator).tolist() if i not in removed]
        yield waiting[: training.batch]
        waiting = waiting[training.batch :]


def train(work: Work, removed: set[int], training: Training, seed: int) -> PreTrainedModel:
    """The model after training without these rows."""
    model, pool = load_model(str(work.model), "float32").train(), work.tokens("pool")
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.rate, weight_decay=0.0)
    for ids in batches(len(pool), removed, training, seed):
        losses(model, [pool[i] for i in ids]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def held_out_loss(work: Work, removed: set[int], training: Training, seed: int) -> float:
    """The loss on held-out rows of the target, after training without these rows."""
    model, held = train(work, removed, training, seed), work.tokens("held_out")
    with torch.no_grad():
        return float(losses(model, held).double().mean())


def save_trained(work: Work, folder: Path, training: Training, seed: int) -> Path:
    """Train on everything, and write a model folder."""
    shutil.copytree(work.model, folder, dirs_exist_ok=True)
    train(work, set(), training, seed).save_pretrained(folder)
    return folder


def losses(model: PreTrainedModel, examples: Tokens) -> Tensor:
    """The mean over supervised tokens of each example's negative log-likelihood."""
    longest = max(len(example["input_ids"]) for example in examples)
    inputs = _padded([example["input_ids"] for example in examples], longest, 0)
    labels = _padded([example["labels"] for example in examples], longest, -100)[:, 1:]
    logits = model(input_ids=inputs).logits[:, :-1]  # causal: padding behind an example changes nothing before it
    by_token = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return by_token.sum(1) / (labels != -100).sum(1)


def _padded(rows: list[list[int]], length: int, filler: int) -> Tensor:
    return torch.tensor([row + [filler] * (length - len(row)) for row in rows])


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half of its 95% interval by Student's t."""
    spread = statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), t_quantile(len(values) - 1) * spread
