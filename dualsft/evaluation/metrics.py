"""Metrics over supervised tokens and over answers of each validation set, accumulated over batches and processes."""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float, Int
from lightning import Trainer
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from dualsft.data.layout import Batch
from dualsft.data.module import InstructionDataModule
from dualsft.data.options import validation_key
from dualsft.errors import UserError
from dualsft.models import PreTrainedModel
from dualsft.objectives.chunks import supervised_values
from dualsft.objectives.cross_entropy import cross_entropy
from dualsft.objectives.supervised import Supervised
from dualsft.sharding.local_batch import local_rows


class LanguageModelMetrics(torch.nn.Module):
    """Loss, perplexity and accuracy over supervised tokens, with equal weights.

    Args:
        by_example: Whether the mean over the examples of each one's mean loss is measured, too.
    """

    def __init__(self, by_example: bool = False) -> None:
        super().__init__()
        # by default torchmetrics leaves NaN out of the mean, with a warning: a broken model would look sound
        self.loss = MeanMetric(nan_strategy="disable")
        self.accuracy = MeanMetric(nan_strategy="disable")
        self.example_loss = MeanMetric(nan_strategy="disable") if by_example else None

    def measure(self, model: PreTrainedModel, batch: Batch) -> None:
        """Add a model's predictions for one padded batch; each rank evaluates its own rows."""
        own = local_rows(batch)
        supervised = Supervised.of(own)
        targets = supervised.targets

        def found(logits: Tensor, where: slice, _: object) -> Tensor:
            nll = cross_entropy(logits, targets[where])
            return torch.stack([nll, (logits.argmax(1) == targets[where]).to(nll.dtype)], 1)

        with torch.no_grad():
            values = supervised_values(model, own, supervised, found)
            self._add(values[:, 0], values[:, 1], supervised)

    @torch.no_grad()
    def update(self, logits: Float[Tensor, "example token vocabulary"], labels: Int[Tensor, "example token"]) -> None:
        """Add one batch."""
        supervised = Supervised.of({"labels": labels})
        predicting = supervised.pick(logits)
        nll = cross_entropy(predicting, supervised.targets)
        self._add(nll, (predicting.argmax(1) == supervised.targets).float(), supervised)

    def _add(self, nll: Tensor, hits: Tensor, supervised: Supervised) -> None:
        """Add the loss of each supervised token, and whether it is the likeliest."""
        self.loss.update(nll)
        self.accuracy.update(hits)
        if self.example_loss is not None:
            counts = supervised.spread(torch.ones_like(nll)).sum(1)
            self.example_loss.update((supervised.spread(nll).sum(1) / counts)[counts > 0])

    def compute(self) -> dict[str, Tensor]:
        """``loss`` in nats per token, ``perplexity`` = exp(loss), ``token_accuracy`` in [0, 1]; ``example_loss``."""
        loss = self.loss.compute()
        found = {"loss": loss, "perplexity": loss.exp(), "token_accuracy": self.accuracy.compute()}
        return found | ({"example_loss": self.example_loss.compute()} if self.example_loss is not None else {})

    def reset(self) -> None:
        """Forget all batches."""
        self.loss.reset()
        self.accuracy.reset()
        if self.example_loss is not None:
            self.example_loss.reset()


class ExactMatch(Metric):
    """Share of answers that equal their reference, both already extracted from the text."""

    higher_is_better = True
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")
        self.hits: Tensor
        self.total: Tensor

    def update(self, answers: list[str | None], references: list[str | None]) -> None:
        """Add one batch; an answer that was not found (None) never matches."""
        for answer, reference in zip(answers, references, strict=True):
            self.hits += int(answer is not None and answer == reference)
        self.total += len(references)

    def compute(self) -> Tensor:
        """In [0, 1]; NaN before the first answer."""
        return self.hits / self.total


def validation_names(trainer: Trainer) -> list[str | None]:
    """The names of a run's validation sets, in the order of their loaders; a single source has none: [None]."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, InstructionDataModule) and data.named_validation:
        return list(data.validation_sets)
    return [None]


def check_validation_data(trainer: Trainer) -> None:
    """Refuse a validation set without labels, which Lightning would skip silently."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, InstructionDataModule):
        return
    for name, examples in zip(validation_names(trainer), data.validation_sets.values(), strict=False):
        if not examples.ok_ids():
            counts = ", ".join(f"{count} {status}" for status, count in examples.counts().items())
            raise UserError(
                f"No example of {validation_key(name)} has a response within data.max_length={data.max_length} tokens "
                f"({counts})."
            )


class ValidationMetrics(torch.nn.Module):
    """The metrics of each validation set, and their means over the sets.

    Args:
        names: The sets' names, in the order of their loaders; None for a single source, which has none.
        exact_match: Whether answers are compared, too.
        by_example: As of `LanguageModelMetrics`.
    """

    def __init__(self, names: Sequence[str | None], exact_match: bool = False, by_example: bool = False) -> None:
        super().__init__()
        self._names = tuple(names)
        self._tokens = torch.nn.ModuleList(LanguageModelMetrics(by_example) for _ in names)
        self._answers = torch.nn.ModuleList(ExactMatch() for _ in names if exact_match)

    def tokens(self, index: int) -> LanguageModelMetrics:
        """The metrics over tokens of the set whose loader has this index."""
        return cast(LanguageModelMetrics, self._tokens[index])

    def answers(self, index: int) -> ExactMatch:
        """The metric over answers of the set whose loader has this index."""
        return cast(ExactMatch, self._answers[index])

    def finish(self) -> dict[str, Tensor]:
        """Compute the metrics of all batches since the last call, and reset them.

        Returns:
            ``loss`` in nats per token, ``perplexity``, ``token_accuracy`` and, if answers are compared,
            ``exact_match``. With named sets these are means in which every set weighs the same, whatever its size, and
            each set's own are beside them: ``loss/NAME``.
        """
        results = [self._finish_set(index) for index in range(len(self._names))]
        metrics: dict[str, Tensor] = {}
        for metric in results[0]:
            values = [of_set[metric] for of_set in results]
            metrics[metric] = torch.stack(values).mean()
            metrics |= {f"{metric}/{n}": v for n, v in zip(self._names, values, strict=True) if n is not None}
        return metrics

    def _finish_set(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens(index)
        metrics = tokens.compute()
        tokens.reset()
        if self._answers:
            metrics["exact_match"] = self.answers(index).compute()
            self.answers(index).reset()
        return metrics
