"""Metrics over supervised tokens and over answers, accumulated by torchmetrics over batches and processes."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from dualsft.data.layout import Batch
from dualsft.models import PreTrainedModel
from dualsft.objectives import token_losses
from dualsft.sharding.local_batch import local_rows


class LanguageModelMetrics(torch.nn.Module):
    """Loss, perplexity and accuracy per supervised token, each token weighing the same."""

    def __init__(self) -> None:
        super().__init__()
        # by default torchmetrics leaves NaN out of the mean, with a warning: a broken model would look sound
        self.loss = MeanMetric(nan_strategy="disable")
        self.accuracy = MeanMetric(nan_strategy="disable")

    def measure(self, model: PreTrainedModel, batch: Batch) -> None:
        """Add a model's predictions for one padded batch, of which each rank evaluates its own rows."""
        own = local_rows(batch)
        logits = model(input_ids=own["input_ids"], attention_mask=own["attention_mask"], use_cache=False).logits
        self.update(logits, own["labels"])

    @torch.no_grad()
    def update(self, logits: Float[Tensor, "example token vocabulary"], labels: Int[Tensor, "example token"]) -> None:
        """Add one batch."""
        nll, targets = token_losses(logits, labels)
        supervised = targets != -100
        hits = logits[:, :-1].argmax(-1) == targets
        self.loss.update(nll[supervised])
        self.accuracy.update(hits[supervised].float())

    def compute(self) -> dict[str, Tensor]:
        """``loss`` in nats per token, ``perplexity`` = exp(loss), ``token_accuracy`` in [0, 1]."""
        loss = self.loss.compute()
        return {"loss": loss, "perplexity": loss.exp(), "token_accuracy": self.accuracy.compute()}

    def reset(self) -> None:
        """Forget all batches."""
        self.loss.reset()
        self.accuracy.reset()


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
