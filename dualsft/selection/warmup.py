"""The warm-up: a short dense fine-tune on a random part of the pool that yields θ and Adam's second moment.

ĉ = c / (1 − β₂^t), the bias-corrected second moment after t steps, feeds the preconditioner P = 1/(sqrt(ĉ)+eps).
Source: arXiv 2605.06166 (10% of the pool, 1 epoch, learning rate 2e-5).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW

from dualsft.data.layout import Batch, split_rows, to_device
from dualsft.data.loaders import ResumableLoader
from dualsft.errors import UserError, is_out_of_memory, shortage
from dualsft.matrix.nonfinite import all_finite, drop_examples, nonfinite_examples
from dualsft.matrix.passes import Keeper, Watch
from dualsft.models import PreTrainedModel
from dualsft.objectives import example_losses
from dualsft.runs.progress import say
from dualsft.sharding.collectives import all_gather, any_rank, world_size
from dualsft.sharding.local_batch import local_rows
from dualsft.sharding.shards import compute_device, local_shard
from dualsft.training.compact import CompactParameters

BETAS, EPS = (0.9, 0.999), 1e-8
ADVICE = (
    "beside the model and a batch it takes 16 bytes for each weight: set model.gradient_checkpointing and go on with "
    "--resume, or start anew (--overwrite) with a lower data.batch_tokens or data.batch_size, with "
    "model.warmup.fraction 0, or with a ready model.warmup.checkpoint"
)
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
    keeper: Keeper | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Fine-tune every weight in place with AdamW (no weight decay).

    Args:
        model: The base model; holds θ afterwards.
        batches: Re-iterable training batches, one optimizer step each.
        epochs: Passes over the batches.
        learning_rate: Constant.
        watch: Wraps the iteration, for progress.
        keeper: Saves the state of the warm-up from time to time, and loads the state of an earlier run.
        seed: Decides which activations dropout drops.

    Returns:
        Parameter name -> ĉ, the bias-corrected second moment, float32, of the parameter's shape.

    Raises:
        UserError: if a loss or gradient stops being finite, or memory runs out for the second time.
    """
    run = _WarmUp(model, learning_rate, seed)
    try:
        device = compute_device(model)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            run.all_steps(batches, epochs, watch, keeper)
        return run.second_moment()
    finally:
        run.close()


class _WarmUp:
    """The warm-up's model, masters and optimizer; a run resumes from their state at the start of a step."""

    def __init__(self, model: PreTrainedModel, learning_rate: float, seed: int) -> None:
        self._model, self._seed = model, seed
        self._compact = CompactParameters(model)
        masters = self._compact.parameters()
        self._optimizer = AdamW(masters, lr=learning_rate, betas=BETAS, eps=EPS, weight_decay=0.0)
        self._compact.write_back_after(self._optimizer)
        self._compact.attach()
        self._parts = 1

    def all_steps(self, batches: Iterable[Batch], epochs: int, watch: Watch, keeper: Keeper | None) -> None:
        """Take every step that an earlier run has not taken."""
        first, done = self._resume(keeper.load() if keeper else None)
        self._model.train()
        for epoch in range(first, epochs):
            for k, batch in enumerate(watch(_of_epoch(batches, epoch, done)), done):
                if keeper and any_rank(keeper.due()):
                    keeper.save(*self._state(epoch, k))
                while not self._step(batch, epoch, k):
                    if keeper:  # at once, as a resumed run must also take this step in halves
                        keeper.save(*self._state(epoch, k))
            done = 0

    def close(self) -> None:
        """Remove the hooks from the model after the warm-up, or its failure."""
        self._compact.detach()
        self._model.eval()

    def _step(self, batch: Batch, epoch: int, k: int) -> bool:
        """Take an optimizer step on the batch's mean loss; False if memory ran out and it must be retaken in halves.

        Dropout's seed depends on the step alone, so a resumed run draws the same.
        """
        mixed = np.random.SeedSequence((self._seed, epoch, k))  # a hash: unrelated seeds for all steps
        torch.manual_seed(int(mixed.generate_state(1, np.uint64)[0]))
        try:
            self._backward(batch)
        except Exception as error:
            if not is_out_of_memory(error) or world_size() > 1:  # the other ranks are in the middle of the step
                raise
            reason = shortage(error)
        else:
            self._optimizer.step()
            return True
        self._halve(reason)  # outside the handler, whose traceback holds on to the batch
        return False

    def _backward(self, batch: Batch) -> None:
        """Compute the gradient of the mean loss over the batch's finite examples; each rank takes a share of them."""
        count = len(batch["example_id"])
        for part in split_rows(local_rows(batch), self._parts):
            losses = example_losses(self._model, to_device(part, compute_device(self._model)))
            bad = [int(part["example_id"][k]) for k in (~losses.isfinite()).nonzero().flatten().tolist()]
            if suspects := {i for of_rank in all_gather(bad) for i in of_rank}:  # the same on all ranks
                return self._backward_without("loss", batch, suspects)
            (losses.sum() / count).backward()  # parts and ranks add up to the gradient of the batch's mean
        if not self._finite_gradients():
            self._backward_without("gradient", batch, set(batch["example_id"].tolist()))

    def _backward_without(self, what: str, batch: Batch, suspects: set[int]) -> None:
        """Begin the step again without the suspects that are not finite alone; refused if none or all are so."""
        self._drop_gradients()
        ids = batch["example_id"].tolist()
        bad = nonfinite_examples(batch, self._finite_alone, suspects)
        if not bad or len(bad) == len(ids) > 1:
            raise UserError(
                f"The warm-up's {what} is not finite at the examples {bad or ids}; remove them from data.train, lower "
                "model.warmup.learning_rate, or set model.warmup.fraction to 0."
            )
        say(f"the warm-up leaves out the examples {bad}: their {what} is not finite.")
        if len(bad) < len(ids):
            self._backward(drop_examples(batch, bad))

    def _finite_alone(self, example: Batch) -> bool:
        loss = example_losses(self._model, to_device(example, compute_device(self._model))).sum()
        if not bool(loss.isfinite()):
            return False
        loss.backward()
        finite = self._finite_gradients()
        self._drop_gradients()
        return finite

    def _finite_gradients(self) -> bool:
        finite = [all_finite(m.grad) for m in self._compact.masters if m.grad is not None and m.grad.numel()]
        return not any_rank(bool(finite) and not bool(torch.stack(finite).all()))

    def _drop_gradients(self) -> None:
        for parameter in (*self._model.parameters(), *self._compact.masters):
            parameter.grad = None

    def _halve(self, reason: str) -> None:
        if self._parts > 1:
            raise UserError(f"Memory ran out in the warm-up ({reason}) with half batches already; {ADVICE}.")
        say(f"memory ran out in the warm-up ({reason}); it goes on in half batches.")
        self._parts = 2
        self._drop_gradients()  # what the failed backward left half done
        torch.cuda.empty_cache()  # does nothing where CUDA is not in use

    def second_moment(self) -> dict[str, Tensor]:
        """ĉ of every parameter, zero for one that takes no part; frees the optimizer's state."""
        weights = dict(self._model.named_parameters())
        moments = {}
        for name, master in zip(self._compact.names, self._compact.masters, strict=True):
            state = self._optimizer.state.pop(master, None)
            moment = state["exp_avg_sq"] if state else torch.zeros_like(master)
            correction = 1 - BETAS[1] ** float(state["step"]) if state else 1.0
            moments[name] = moment.div_(correction).view_as(local_shard(weights[name].detach()))
        return moments

    def _state(self, epoch: int, done: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state from which a run resumes with this batch of this epoch."""
        tensors = {}
        for k, master in enumerate(self._compact.masters):
            tensors[f"master:{k}"] = master
            tensors |= {f"{name}:{k}": value for name, value in self._optimizer.state[master].items()}
        return tensors, {"epoch": epoch, "done": done, "parts": self._parts}

    def _resume(self, kept: tuple[dict[str, Tensor], dict[str, Any]] | None) -> tuple[int, int]:
        """Resume from the state that an earlier run kept; return the epoch, and how many of its batches are done."""
        if kept is None:
            return 0, 0
        tensors, notes = kept
        for k, master in enumerate(self._compact.masters):
            master.data.copy_(tensors[f"master:{k}"])
            state = {name: tensors[f"{name}:{k}"] for name in _ADAM_STATE if f"{name}:{k}" in tensors}
            self._optimizer.state[master] = {n: v if n == "step" else v.to(master.device) for n, v in state.items()}
        self._compact.write_back()  # the weights are the masters, rounded, and need no storage
        self._parts = notes["parts"]
        return notes["epoch"], notes["done"]


def _of_epoch(batches: Iterable[Batch], epoch: int, done: int) -> Iterable[Batch]:
    """The epoch's batches without the first ones, which are done."""
    if not isinstance(batches, ResumableLoader):
        return islice(batches, done, None)
    batches.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    batches.load_state_dict({"epoch": epoch, "yielded": done, "batches": len(batches)})
    return batches
