"""The warm-up: a short dense fine-tune on a random part of the pool that yields θ and Adam's second moment.

ĉ = c / (1 − β₂^t), the bias-corrected second moment after t steps, feeds the preconditioner P = 1/(sqrt(ĉ)+eps).
Source: arXiv 2605.06166 (10% of the pool, 1 epoch, learning rate 2e-5).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dualsft.data.layout import Batch
from dualsft.errors import UserError
from dualsft.matrix.passes import Watch
from dualsft.models import PreTrainedModel
from dualsft.selection.dense_training import DenseTraining, TrainingKeeper, TrainingNames
from dualsft.selection.offload import Offload

ADVICE = (
    "beside the model and a batch it takes 16 bytes for each weight: set model.offload_optimizer to always, which "
    "holds those on the host, or model.gradient_checkpointing, and go on with --resume, or start anew (--overwrite) "
    "with a lower data.batch_tokens or data.batch_size, with model.warmup.fraction 0, or with a ready "
    "model.warmup.checkpoint"
)
NAMES = TrainingNames(
    "warm-up",
    "remove them from data.train, lower model.warmup.learning_rate, or set model.warmup.fraction to 0",
    ADVICE,
)


@dataclass(frozen=True)
class Warmup:
    """How the scoring checkpoint is made.

    Args:
        fraction: Share of the pool to fine-tune on before scoring, drawn at random; 0 scores at the base model.
        epochs: Passes over that share.
        learning_rate: AdamW's, constant.
        checkpoint: A ready scoring checkpoint (a Hugging Face folder of the same architecture) instead of a warm-up; a
            file ``second_moment.safetensors`` in it serves the adam preconditioner.
        keep: Write the scoring checkpoint to ``warmup/`` in the output folder, fit to be given as ``checkpoint``.
    """

    fraction: float = 0.1
    epochs: int = 1
    learning_rate: float = 2e-5
    checkpoint: str | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise UserError(f"model.warmup.fraction is {self.fraction}; give a share from 0 (no warm-up) to 1.")
        if self.epochs < 1:
            raise UserError(
                f"model.warmup.epochs is {self.epochs}; give at least 1, or set model.warmup.fraction to 0."
            )
        if not self.learning_rate > 0:
            raise UserError(f"model.warmup.learning_rate is {self.learning_rate}; give a positive number.")
        if self.keep and (self.checkpoint is not None or self.fraction == 0):
            raise UserError(
                "model.warmup.keep is set, but no warm-up is made; give model.warmup.fraction and no "
                "model.warmup.checkpoint, or drop it."
            )

    @property
    def gives_second_moment(self) -> bool:
        """Whether there is a warm-up, or a checkpoint that may hold its second moment."""
        return self.fraction > 0 or self.checkpoint is not None

    def draw(self, pool: list[int], seed: int) -> list[int]:
        """The ids to warm up on: this fraction of the pool (at least one), at random, in source order."""
        count = max(1, round(self.fraction * len(pool)))
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        return [pool[k] for k in sorted(order[:count].tolist())]


def warm_up(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    epochs: int,
    learning_rate: float,
    watch: Watch = iter,
    keeper: TrainingKeeper | None = None,
    seed: int = 0,
    offload: Offload = "auto",
) -> Mapping[str, Tensor]:
    """Fine-tune every weight in place with AdamW (no weight decay).

    Args:
        model: The base model; holds θ afterwards.
        batches: Re-iterable training batches, one optimizer step each.
        epochs: Passes over the batches.
        learning_rate: Constant.
        watch: Wraps the iteration, for progress.
        keeper: Saves the state of the warm-up from time to time, and loads the state of an earlier run.
        seed: Decides which activations dropout drops.
        offload: Whether float32 weights, gradients and moments are held on the host.

    Returns:
        Parameter name -> ĉ, the bias-corrected second moment, float32, of the parameter's shape.

    Raises:
        UserError: if a loss or gradient stops being finite, or memory runs out for the second time.
    """
    training = DenseTraining(model, learning_rate, seed, NAMES, offload=offload)
    try:
        for _ in training.steps(batches, epochs, watch, keeper):
            pass
        return training.second_moment()
    finally:
        training.close()
