"""Warm-up: a short dense fine-tune on a random part of the pool, for the scoring checkpoint θ and Adam's second moment.

ĉ = c / (1 − β₂^t), the bias-corrected second moment after t steps, feeds the preconditioner P = 1/(sqrt(ĉ)+eps).
Source: arXiv 2605.06166 (10% of the pool, 1 epoch, learning rate 2e-5).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel

from dualsft.compact import CompactParameters
from dualsft.data import ResumableLoader, TrainingBatches
from dualsft.errors import UserError
from dualsft.gradients import Watch
from dualsft.objective import Batch, example_losses

BETAS, EPS = (0.9, 0.999), 1e-8


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

    def draw(self, pool: list[int], seed: int) -> list[int]:
        """The ids to warm up on: this fraction of the pool (at least one), at random, in source order."""
        count = max(1, round(self.fraction * len(pool)))
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        return [pool[k] for k in sorted(order[:count].tolist())]


def warm_up(
    model: PreTrainedModel, batches: Iterable[Batch], epochs: int, learning_rate: float, watch: Watch = iter
) -> dict[str, Tensor]:
    """Fine-tune every weight in place with AdamW (no weight decay).

    Args:
        model: The base model; holds θ afterwards.
        batches: Re-iterable training batches, one optimizer step each.
        epochs: Passes over the batches.
        learning_rate: AdamW's, constant.
        watch: Wraps the iteration, for progress.

    Returns:
        Parameter name -> ĉ, the bias-corrected second moment, float32, of the parameter's shape.

    Raises:
        UserError: if the loss stops being finite.
    """
    compact = CompactParameters(model)
    optimizer = AdamW(compact.parameters(), lr=learning_rate, betas=BETAS, eps=EPS, weight_decay=0.0)
    compact.write_back_after(optimizer)
    compact.attach()
    model.train()
    for epoch in range(epochs):
        if isinstance(batches, ResumableLoader):
            cast(TrainingBatches, batches.sampler).set_epoch(epoch)
        for batch in watch(batches):
            losses = example_losses(model, {k: v.to(model.device) for k, v in batch.items()})
            _check_finite(losses, batch)
            losses.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    compact.detach()
    model.eval()
    return _second_moment(compact, optimizer, dict(model.named_parameters()))


def _check_finite(losses: Float[Tensor, " example"], batch: Batch) -> None:
    if not bool(losses.isfinite().all()):
        bad = batch["example_id"][~losses.isfinite().cpu()].tolist()
        raise UserError(
            f"The warm-up's loss is not finite at the examples {bad}; remove them from data.train, lower "
            "model.warmup.learning_rate, or set model.warmup.fraction to 0."
        )


def _second_moment(
    compact: CompactParameters, optimizer: AdamW, weights: dict[str, torch.nn.Parameter]
) -> dict[str, Tensor]:
    moments = {}
    for name, master in zip(compact.names, compact.masters, strict=True):
        state = optimizer.state.pop(master)
        correction = 1 - BETAS[1] ** float(state["step"])
        moments[name] = state["exp_avg_sq"].div_(correction).view_as(weights[name])
    return moments
