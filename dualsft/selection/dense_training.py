"""Trains every weight of a model in place, step by step: a warm-up, or a path along which a pool is scored.

A run resumes from the state at the start of a step, and then takes the same steps as an unbroken one.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, AdamW

from dualsft.data.dealing import DealtBatch, extent_of
from dualsft.data.layout import Batch, split_rows, to_device, unlabelled
from dualsft.data.loaders import ResumableLoader
from dualsft.errors import UserError, is_out_of_memory, shortage
from dualsft.matrix.nonfinite import all_finite, drop_examples, nonfinite_examples
from dualsft.matrix.passes import Keeper, Watch
from dualsft.models import PreTrainedModel
from dualsft.models.lazy import LazyTensors
from dualsft.objectives import example_losses
from dualsft.runs.progress import say
from dualsft.selection.offload import Offload, offloads_training
from dualsft.sharding.collectives import all_gather, all_reduce_max, any_rank
from dualsft.sharding.groups import calls_alone, has_full_replicas
from dualsft.sharding.local_batch import local_rows
from dualsft.sharding.shards import compute_device, local_shard
from dualsft.training.compact import CompactParameters

BETAS, EPS = (0.9, 0.999), 1e-8
_ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
OptimizerName = Literal["adamw", "sgd"]


class TrainingKeeper(Keeper, Protocol):
    """Keeps the state of a training under way.

    Attributes:
        halved: Whether its batches are to be taken in halves.
    """

    halved: bool

    def halve(self) -> None:
        """Have all ranks take them in halves when the run is resumed."""


@dataclass(frozen=True)
class TrainingNames:
    """The words of a training's messages.

    Attributes:
        what: The training's name.
        remedy: What can be done where a loss or gradient is not finite.
        advice: What can be done where memory runs out.
    """

    what: str
    remedy: str
    advice: str


class DenseTraining:
    """Fine-tunes every weight in place with a constant learning rate and no weight decay.

    Args:
        model: The model; its weights are trained in place.
        learning_rate: The optimizer's.
        seed: Decides which activations dropout drops.
        names: The words of its messages.
        optimizer: ``adamw``, or ``sgd`` without momentum.
        offload: Whether the float32 weights, their gradients and the optimizer's state are held on the host.

    Raises:
        UserError: from `steps`, if a loss or gradient stops being finite, or memory runs out for the second time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        learning_rate: float,
        seed: int,
        names: TrainingNames,
        optimizer: OptimizerName = "adamw",
        offload: Offload = "auto",
    ) -> None:
        self._model, self._seed, self._names = model, seed, names
        on_host = offloads_training(offload, model, names.what)
        self._compact = CompactParameters(model, on_host=on_host)
        masters = self._compact.parameters()
        self._optimizer: torch.optim.Optimizer
        if optimizer == "adamw":
            # fused, as torch's default for CUDA holds the square roots of all second moments in passing, and the host's
            # goes over each tensor several times
            fused = on_host or _on_cuda(self._compact.masters)
            self._optimizer = AdamW(masters, learning_rate, BETAS, EPS, weight_decay=0.0, fused=fused)
        else:
            self._optimizer = SGD(masters, lr=learning_rate)
        self._compact.write_back_after(self._optimizer)
        self._compact.attach()
        self._parts = 1
        self._keeper: TrainingKeeper | None = None
        self._batches: Iterable[Batch] = ()

    def steps(
        self, batches: Iterable[Batch], epochs: int, watch: Watch = iter, keeper: TrainingKeeper | None = None
    ) -> Iterator[int]:
        """Take every step that an earlier run has not taken; yield after each how many have been taken in all.

        Args:
            batches: Re-iterable training batches, one optimizer step each.
            epochs: Passes over the batches.
            watch: Wraps the iteration, for progress.
            keeper: Saves the state from time to time, and loads the state of an earlier run.
        """
        self._batches, self._keeper = batches, keeper
        first, done, taken = self._resume(keeper.load() if keeper else None)
        if keeper and keeper.halved:
            self._parts = 2
        for epoch in range(first, epochs):
            for k, batch in enumerate(watch(_of_epoch(batches, epoch, done)), done):
                if keeper and any_rank(keeper.due()):
                    keeper.save(*self._state(epoch, k, taken))
                while not self._step(batch, epoch, k):
                    if keeper:  # at once, as a resumed run must also take this step in halves
                        keeper.save(*self._state(epoch, k, taken))
                taken += 1
                yield taken
            done = 0

    def close(self) -> None:
        """Remove the hooks from the model after the training, or its failure."""
        self._compact.detach()
        self._model.eval()

    def _step(self, batch: Batch, epoch: int, k: int) -> bool:
        """Take an optimizer step on the batch's mean loss; False if memory ran out and it must be retaken in halves.

        Dropout's seed depends on the step alone, so a resumed run draws the same.
        """
        mixed = np.random.SeedSequence((self._seed, epoch, k))  # a hash: unrelated seeds for all steps
        device = compute_device(self._model)
        self._model.train()
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(int(mixed.generate_state(1, np.uint64)[0]))
                self._backward(batch)
        except Exception as error:
            if not is_out_of_memory(error) or has_full_replicas() or not (calls_alone() or self._keeper):
                raise
            reason = shortage(error)
        else:
            self._optimizer.step()
            return True
        self._halve(reason)  # outside the handler, whose traceback holds on to the batch
        return False

    def _backward(self, batch: Batch) -> None:
        """Compute the gradient of the mean loss over the batch's finite examples; each rank takes a share of them."""
        ids = extent_of(batch).ids
        bad = self._backward_own(local_rows(batch), len(ids))
        if suspects := {i for of_rank in all_gather(bad) for i in of_rank}:  # the same on all ranks
            return self._backward_without("loss", batch, suspects)
        self._compact.add_up_gradients()
        if not self._finite_gradients():
            self._backward_without("gradient", batch, set(ids))

    def _backward_own(self, rows: Batch, count: int) -> list[int]:
        """Add this rank's share of the gradient of a mean over ``count`` examples; return ids whose loss is not finite.

        A replica out of memory takes its rows again, in halves, while the others wait for its gradient.
        """
        try:
            return self._backward_in_parts(rows, count)
        except Exception as error:
            if not is_out_of_memory(error) or not has_full_replicas():
                raise
            reason = shortage(error)
        self._halve(reason)  # outside the handler, whose traceback holds on to the batch
        return self._backward_own(rows, count)

    def _backward_in_parts(self, rows: Batch, count: int) -> list[int]:
        bad: list[int] = []
        for part in self._split(rows):
            losses = example_losses(self._model, to_device(part, compute_device(self._model)))
            bad += part["example_id"][~losses.detach().isfinite().cpu()].tolist()
            (losses.sum() / count).backward()  # parts and ranks add up to the gradient of the batch's mean
            self._compact.receive()
        return bad

    def _split(self, rows: Batch) -> list[Batch]:
        """This rank's rows in parts: of shards as many on every rank, some without labels where there are too few."""
        parts = split_rows(rows, self._parts)
        if calls_alone() or self._parts == 1:
            return parts
        most = all_reduce_max(len(parts))
        return parts + [unlabelled(parts[-1])] * (most - len(parts))

    def _backward_without(self, what: str, batch: Batch, suspects: set[int]) -> None:
        """Begin the step again without the suspects that are not finite alone; refused if none or all are so."""
        self._drop_gradients()
        batch = self._whole(batch)
        ids = batch["example_id"].tolist()
        bad = nonfinite_examples(batch, self._finite_alone, suspects)
        if not bad or len(bad) == len(ids) > 1:
            raise UserError(
                f"The {self._names.what}'s {what} is not finite at the examples {bad or ids}; {self._names.remedy}."
            )
        say(f"the {self._names.what} leaves out the examples {bad}: their {what} is not finite.")
        if len(bad) < len(ids):
            self._backward(drop_examples(batch, bad))

    def _whole(self, batch: Batch) -> Batch:
        """All rows of a batch, read again if it has this rank's alone."""
        if not isinstance(batch, DealtBatch):
            return batch
        assert isinstance(self._batches, ResumableLoader)
        whole: Batch = self._batches.batch(batch.rows)
        return whole

    def _finite_alone(self, example: Batch) -> bool:
        loss = example_losses(self._model, to_device(example, compute_device(self._model))).sum()
        if not bool(loss.isfinite()):
            return False
        loss.backward()
        self._compact.receive()
        finite = self._finite_gradients()
        self._drop_gradients()
        return finite

    def _finite_gradients(self) -> bool:
        finite = [all_finite(m.grad) for m in self._compact.masters if m.grad is not None and m.grad.numel()]
        return not any_rank(bool(finite) and not bool(torch.stack(finite).all()))

    def _drop_gradients(self) -> None:
        for parameter in self._model.parameters():
            parameter.grad = None
        self._compact.drop_gradients()

    def _halve(self, reason: str) -> None:
        if self._parts > 1:
            what, advice = self._names.what, self._names.advice
            raise UserError(f"Memory ran out in the {what} ({reason}) with half batches already; {advice}.")
        where = f"ran out in the {self._names.what} ({reason})"
        if not calls_alone() and self._keeper:  # the other ranks are in the middle of the step
            self._keeper.halve()
            raise UserError(f"Memory {where}; go on with --resume on as many ranks, with its batches in halves then.")
        say(f"memory {where}; it goes on in half batches.", of_rank=has_full_replicas())
        self._parts = 2
        self._drop_gradients()  # what the failed backward left half done
        torch.cuda.empty_cache()  # does nothing where CUDA is not in use

    def second_moment(self) -> LazyTensors:
        """ĉ of every parameter, the bias-corrected second moment, zero for one that takes no part; Adam's alone.

        Each tensor is made when it is read, from the optimizer's present state.
        """
        weights = dict(self._model.named_parameters())
        masters = dict(zip(self._compact.names, self._compact.masters, strict=True))

        def make(name: str) -> Tensor:
            state = self._optimizer.state.get(masters[name])
            moment = state["exp_avg_sq"] if state else torch.zeros_like(masters[name].detach())
            correction = 1 - BETAS[1] ** float(state["step"]) if state else 1.0
            return moment.div(correction).view_as(local_shard(weights[name].detach()))

        return LazyTensors(masters, make)

    def _state(self, epoch: int, done: int, taken: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state from which a run resumes with this batch of this epoch."""
        tensors = {}
        for k, master in enumerate(self._compact.masters):
            tensors[f"master:{k}"] = master
            tensors |= {f"{name}:{k}": value for name, value in self._optimizer.state[master].items()}
        return tensors, {"epoch": epoch, "done": done, "taken": taken, "parts": self._parts}

    def _resume(self, kept: tuple[Mapping[str, Tensor], dict[str, Any]] | None) -> tuple[int, int, int]:
        """Resume from the state that an earlier run kept; return the epoch, its finished batches, and all steps."""
        if kept is None:
            return 0, 0, 0
        tensors, notes = kept
        for k, master in enumerate(self._compact.masters):
            master.data.copy_(tensors[f"master:{k}"])
            state = {name: tensors[f"{name}:{k}"] for name in _ADAM_STATE if f"{name}:{k}" in tensors}
            # a fused optimizer counts the steps on the device, any other on the host
            moved = _ADAM_STATE if self._optimizer.defaults.get("fused") else _ADAM_STATE[1:]
            self._optimizer.state[master] = {n: v.to(master.device) if n in moved else v for n, v in state.items()}
        self._compact.write_back()  # the weights are the masters, rounded, and need no storage
        self._parts = notes["parts"]
        return notes["epoch"], notes["done"], notes.get("taken", 0)


def _on_cuda(tensors: Iterable[Tensor]) -> bool:
    return all(tensor.device.type == "cuda" for tensor in tensors)


def _of_epoch(batches: Iterable[Batch], epoch: int, done: int) -> Iterable[Batch]:
    """The epoch's batches without the first ones, which are done."""
    if not isinstance(batches, ResumableLoader):
        return islice(batches, done, None)
    batches.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    batches.load_state_dict({"epoch": epoch, "yielded": done, "batches": len(batches)})
    return batches
