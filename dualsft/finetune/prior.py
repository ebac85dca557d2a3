"""The prior term in the loss of a fit, which keeps the model near the base model on what it is not trained on.

    L = the training loss + λ · mean_i τ² w_i KL_i     over a batch of anchors beside each training batch

with the divergence KL_i of the model from the base model and the confidence w_i of `dualsft.objectives.prior`. Anchors
are the examples of the pool that are not trained on; their own answers say where the two models are compared, and are
not learnt. At the start the term and its gradient are zero.

The base model needs no second copy: it is the model itself while it holds the untouched values of the trained weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from jaxtyping import Float
from torch import Tensor

from dualsft.data.batches import TrainingBatches
from dualsft.data.dealing import extent_of
from dualsft.data.layout import Batch, Layout
from dualsft.data.module import InstructionDataModule
from dualsft.errors import UserError
from dualsft.models import PreTrainedModel
from dualsft.objectives.base_logits import BaseLogits
from dualsft.objectives.prior import Confidence, SelfDistillation, check_prior
from dualsft.sharding.collectives import all_reduce_sum
from dualsft.sharding.local_batch import local_rows
from dualsft.training.compact import CompactParameters


@dataclass(frozen=True)
class TrainingPrior:
    """The prior term of a fit's loss.

    Args:
        weight: λ, beside the training loss's 1; 0 is none, and costs nothing.
        temperature: τ, by which both models' logits are divided.
        confidence: How much an anchor counts: the same each (uniform), by the base model's largest probability
            (max_prob), or less the more uncertain the base model is (entropy_inv).
    """

    weight: float = 0.0
    temperature: float = 2.0
    confidence: Confidence = "max_prob"

    def __post_init__(self) -> None:
        check_prior("model.training_prior", self.weight, self.temperature, self.confidence)


class PriorLoss:
    """λ times the mean of τ² w_i KL_i over a batch of anchors, beside each training batch.

    Args:
        settings: λ, τ and w.
        compact: The trained weights, while the model holds the base model's.
    """

    def __init__(self, settings: TrainingPrior, compact: CompactParameters) -> None:
        self._term = SelfDistillation(settings.weight, 1.0, settings.temperature, settings.confidence)
        self._compact, self._base = compact, compact.stored()

    def draw(self, data: object) -> None:
        """Take what is not trained on of some data as anchors, or all of it if all is trained on.

        Raises:
            UserError: if the data are not an `InstructionDataModule`, which knows what is left out.
        """
        if not isinstance(data, InstructionDataModule):
            raise UserError("model.training_prior needs an InstructionDataModule, whose pool the anchors come from.")
        ids, trained = data.train_examples.ok_ids(), set(data.training_ids())
        self._loader = data.training_loader([i for i in ids if i not in trained] or ids, data.seed + 1, part=data.part)
        self._epoch = lru_cache(1)(cast(TrainingBatches, self._loader.sampler).in_epoch)

    def anchors(self, number: int) -> Batch:
        """The anchors beside the training batch of this number, counted over all epochs; so a resumed fit goes on."""
        epoch, position = divmod(number, len(self._loader))
        return cast(Batch, self._loader.own_part(self._epoch(epoch)[position]))

    def of(self, model: PreTrainedModel, anchors: Batch) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """(the mean without λ, this rank's share of the term), the latter to be differentiated."""
        own, count = local_rows(anchors), len(extent_of(anchors).ids)
        with self._as_base(model):
            old = BaseLogits(model, own)
        losses = self._term.divergences(model, own, Layout.of(own), old).sum()
        return all_reduce_sum(losses.detach()) / count, self._term.weight * losses / count

    @contextmanager
    def _as_base(self, model: PreTrainedModel) -> Iterator[None]:
        """Put the model into evaluation mode with the base model's values in place of what has been trained."""
        training = model.training
        model.eval()
        try:
            with self._compact.holding(self._base):
                yield
        finally:
            model.train(training)
