"""Warm-up: a short dense fine-tune on a random part of the pool, for the scoring checkpoint θ and Adam's second moment.

ĉ = c / (1 − β₂^t), the bias-corrected second moment after t steps, feeds the preconditioner P = 1/(sqrt(ĉ)+eps).
Source: arXiv 2605.06166 (10% of the pool, 1 epoch, learning rate 2e-5).
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel

from dualsft.compact import CompactParameters
from dualsft.data import ResumableLoader
from dualsft.errors import UserError, is_out_of_memory
from dualsft.gradients import Keeper, Watch
from dualsft.layout import Batch, split
from dualsft.objective import example_losses

BETAS, EPS = (0.9, 0.999), 1e-8
_ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


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
    model: PreTrainedModel,
    batches: Iterable[Batch],
    epochs: int,
    learning_rate: float,
    watch: Watch = iter,
    keeper: Keeper | None = None,
) -> dict[str, Tensor]:
    """Fine-tune every weight in place with AdamW (no weight decay).

    Args:
        model: The base model; holds θ afterwards.
        batches: Re-iterable training batches, one optimizer step each.
        epochs: Passes over the batches.
        learning_rate: AdamW's, constant.
        watch: Wraps the iteration, for progress.
        keeper: Keeps the state of the warm-up every so often, and has what an earlier run kept.

    Returns:
        Parameter name -> ĉ, the bias-corrected second moment, float32, of the parameter's shape.

    Raises:
        UserError: if the loss stops being finite, or memory runs out for the second time.
    """
    run = _WarmUp(model, learning_rate)
    first, done = run.take_up(keeper.load() if keeper else None)
    model.train()
    for epoch in range(first, epochs):
        for k, batch in enumerate(watch(_of_epoch(batches, epoch, done)), done):
            if keeper and keeper.due():
                keeper.save(*run.state(epoch, k))
            run.step(batch)
        done = 0
    model.eval()
    return run.second_moment()


def _of_epoch(batches: Iterable[Batch], epoch: int, done: int) -> Iterable[Batch]:
    """The epoch's batches but for the first ones, which are done."""
    if not isinstance(batches, ResumableLoader):
        return islice(batches, done, None)
    batches.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    batches.load_state_dict({"epoch": epoch, "yielded": done, "batches": len(batches)})
    return batches


class _WarmUp:
    """The warm-up's model, masters and optimizer; its state at the start of a step is all that it needs to go on."""

    def __init__(self, model: PreTrainedModel, learning_rate: float) -> None:
        self._model = model
        self._compact = CompactParameters(model)
        masters = self._compact.parameters()
        self._optimizer = AdamW(masters, lr=learning_rate, betas=BETAS, eps=EPS, weight_decay=0.0)
        self._compact.write_back_after(self._optimizer)
        self._compact.attach()
        self._parts = 1

    def step(self, batch: Batch) -> None:
        """One optimizer step on the batch's mean loss; in halves from the first time that memory runs out."""
        try:
            self._backward(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().split("\n")[0]
        else:
            self._optimizer.step()
            self._optimizer.zero_grad()
            return
        self._halve(reason)
        self.step(batch)

    def _backward(self, batch: Batch) -> None:
        count = len(batch["example_id"])
        for part in split(batch, self._parts):
            losses = example_losses(self._model, {k: v.to(self._model.device) for k, v in part.items()})
            _check_finite(losses, part)
            (losses.sum() / count).backward()

    def _halve(self, reason: str) -> None:
        if self._parts > 1:
            raise UserError(
                f"Memory ran out in the warm-up with half batches too ({reason}); lower data.batch_tokens or "
                "data.batch_size, or set model.gradient_checkpointing."
            )
        print(f"dualsft: memory ran out in the warm-up ({reason}); it goes on in half batches.", file=sys.stderr)
        self._parts = 2
        self._optimizer.zero_grad()
        for parameter in self._model.parameters():  # what the failed backward left half done
            parameter.grad = None

    def second_moment(self) -> dict[str, Tensor]:
        """ĉ of every parameter; the warm-up is over."""
        self._compact.detach()
        return _second_moment(self._compact, self._optimizer, dict(self._model.named_parameters()))

    def state(self, epoch: int, done: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What it takes to go on with this batch of this epoch."""
        tensors = {"random": torch.get_rng_state()}
        if self._model.device.type == "cuda":
            tensors["random_cuda"] = torch.cuda.get_rng_state(self._model.device)
        for k, master in enumerate(self._compact.masters):
            tensors[f"master:{k}"] = master
            tensors |= {f"{name}:{k}": value for name, value in self._optimizer.state[master].items()}
        return tensors, {"epoch": epoch, "done": done, "parts": self._parts}

    def take_up(self, kept: tuple[dict[str, Tensor], dict[str, Any]] | None) -> tuple[int, int]:
        """Go on from the state that an earlier run kept; the epoch, and how many of its batches are done."""
        if kept is None:
            return 0, 0
        tensors, notes = kept
        torch.set_rng_state(tensors["random"])
        if "random_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random_cuda"], self._model.device)
        for k, master in enumerate(self._compact.masters):
            master.data.copy_(tensors[f"master:{k}"])
            state = {
                name: tensors[f"{name}:{k}"] for name in ("step", "exp_avg", "exp_avg_sq") if f"{name}:{k}" in tensors
            }
            self._optimizer.state[master] = {n: v if n == "step" else v.to(master.device) for n, v in state.items()}
        self._compact.write_back()
        self._parts = notes["parts"]
        return notes["epoch"], notes["done"]


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
