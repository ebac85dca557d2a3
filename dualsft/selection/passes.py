"""Gradient passes as phases of a run: resumed after a kill, restarted once with half the batch if memory runs out.

On several ranks each takes a part of the examples, before there are batches: every world-size-th one of those sorted by
length, so that all have about as much to do. A replica passes over them by itself, and saves the state of its work; one
that a single rank holds halves its batches without the others, too.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from dualsft.data.layout import Batch
from dualsft.data.module import InstructionDataModule
from dualsft.errors import UserError, is_out_of_memory, shortage
from dualsft.matrix.pass_result import GradientPass
from dualsft.matrix.passes import gradient_pass
from dualsft.models import PreTrainedModel
from dualsft.models.loading import checkpoint_activations
from dualsft.runs.folder import RunFolder
from dualsft.runs.phase_keeper import PhaseKeeper
from dualsft.runs.progress import PhaseLog, say
from dualsft.selection.offload import offloads_sums
from dualsft.selection.settings import SelectionSettings
from dualsft.sharding.collectives import gather_shards
from dualsft.sharding.groups import calls_alone, rank_slice, world_size

Loader = Callable[[int, int, slice], Iterable[Batch]]
"""(start, batch_tokens, part) -> the batches from a number on, of at most so many tokens each, over a part of the
examples, which are in the order of their lengths."""

ADVICE = (
    "set model.gradient_checkpointing and go on with --resume, or start anew (--overwrite) with a lower "
    "data.batch_tokens or data.max_length, or with model.dtype bfloat16"
)
HALVED = "halved"
"""The name of the state that says that the batches have been halved."""


class Passes:
    """Runs gradient passes, at one scoring checkpoint or several, as phases of a run.

    Args:
        model: The model at the scoring checkpoint.
        run: Stores the state of finished passes, of the one in progress, and whether the batches have been halved.
        log: Records each pass's cost, and shows progress.
        settings: Whether to recompute activations in the backward pass, and how often to store the state.
        data: The pool and the validation sets, whose longest example must fit a batch.

    Attributes:
        batch_tokens: Tokens in the largest batch; halved once if memory runs out, in this run or before it was killed;
            of replicas each has its own.
        place: Suffix of the passes' names, where several points of weight space have passes of the same name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        run: RunFolder,
        log: PhaseLog,
        settings: SelectionSettings,
        data: InstructionDataModule,
    ) -> None:
        self._model, self._run, self._log = model, run, log
        self._checkpointing, self._save_minutes = settings.gradient_checkpointing, settings.save_minutes
        self._offload_sums = settings.offload_sums
        pools = (data.train_examples, *data.validation_sets.values())
        self._longest = max(int(pool.lengths[pool.is_ok()].max()) for pool in pools)
        self._of_replica, self._own, self.place = run.of_replica(), run.own(), ""
        self._saved: list[str] = []
        self._unsaved: list[PhaseKeeper] = []
        halved = self._own.load(HALVED)
        tokens: int = halved[1]["batch_tokens"] if halved else data.batch_tokens
        self.batch_tokens = min(gather_shards(tokens))
        self._halved = self.batch_tokens < data.batch_tokens
        self._device_is_short: bool = halved[1].get("device", False) if halved else False

    def run(self, name: str, examples: int, loader: Loader, **options: Any) -> GradientPass:
        """Run one `gradient_pass` under a name that the log shows, or load its result if an earlier run finished it.

        The sums stay in a file until they are used.

        Raises:
            UserError: if an example cannot be scored, or memory runs out for the second time.
        """
        if (finished := self.finished(name)) is not None:
            return finished
        found = self.run_unsaved(name, examples, loader, **options)
        key, keeper = _key(f"{name}{self.place}"), self._unsaved.pop()
        tensors, notes = found.state()
        self._run.save(key, tensors, {**notes, **self._log.latest()}, replaces=[keeper.name])
        del found, tensors  # the sums leave the device, and the host's memory if need be
        keeper.drop()
        saved = self._run.load(key)
        assert saved is not None
        self._saved.append(key)
        return GradientPass.from_state(*saved)

    def run_unsaved(self, name: str, examples: int, loader: Loader, **options: Any) -> GradientPass:
        """Run a pass like `run`, but leave its result in memory, for a caller that saves what it makes of it.

        The state of the pass under way stays until `drop_unsaved`.
        """
        name = f"{name}{self.place}"
        keeper = self._keeper(name)
        columns = options.get("columns", True)
        on_host = columns and self._offloads_sums(name)
        while True:
            try:
                with (
                    self._log.phase(name, examples, keeper.earlier) as keeper.meter,
                    scoring_mode(self._model, self._checkpointing),
                ):
                    found = gradient_pass(
                        self._model,
                        lambda start: loader(start, self.batch_tokens, rank_slice()),
                        keeper.meter,
                        keeper=keeper,
                        sums_on_host=on_host,
                        **options,
                    )
                self._unsaved.append(keeper)
                return found
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = shortage(error)
                self._device_is_short |= isinstance(error, torch.OutOfMemoryError)
            # outside the handler, whose traceback holds on to the batch
            self._restart(name, reason, keeper)
            if columns and not on_host and world_size() == 1:  # replicas add up sums that are all in one kind of place
                on_host = self._offloads_sums(name)

    def _offloads_sums(self, name: str) -> bool:
        return offloads_sums(self._offload_sums, self._model, name, is_short=self._device_is_short)

    @property
    def unsaved(self) -> list[str]:
        """The names of the states that `drop_unsaved` deletes."""
        return [keeper.name for keeper in self._unsaved]

    def drop_unsaved(self) -> None:
        """Delete the states of the passes under way whose results the caller has saved by now."""
        while self._unsaved:
            self._unsaved.pop().drop()

    def finished(self, name: str) -> GradientPass | None:
        """The pass of this name, if an earlier run finished it."""
        name = f"{name}{self.place}"
        if (saved := self._run.load(_key(name))) is None:
            return None
        self._log.restore(saved[1])
        self._saved.append(_key(name))
        self._keeper(name).drop()
        return GradientPass.from_state(*saved)

    def drop_under_way(self, name: str) -> None:
        """Delete what a kill has left of the state of a pass under way whose result is kept elsewhere."""
        self._keeper(f"{name}{self.place}").drop()

    def _keeper(self, name: str) -> PhaseKeeper:
        """Keeps the state of this rank's work in the pass of a name."""
        # a state counts batches, which are others where they were not halved yet
        return PhaseKeeper(self._of_replica, _key(name), self._save_minutes, batch_tokens=self.batch_tokens)

    def forget(self, name: str) -> None:
        """Delete the state of a finished pass, whose results are kept elsewhere; what it cost stays in the log."""
        self._run.drop(_key(f"{name}{self.place}"))

    def forget_all(self) -> None:
        """Delete the states of all passes that were run or found so far, whose results are kept elsewhere."""
        while self._saved:
            self._run.drop(self._saved.pop())

    def _restart(self, name: str, reason: str, keeper: PhaseKeeper) -> None:
        """Prepare to restart the pass with half the batch size, once, if the longest example fits in it.

        Among shards the others are in the middle of the pass: so the job ends, and does it when it is resumed.
        """
        for parameter in self._model.parameters():
            parameter.grad = None  # left by the failed backward pass
        torch.cuda.empty_cache()  # does nothing where CUDA is not in use
        before, half = self.batch_tokens, self.batch_tokens // 2
        if self._halved or half < self._longest:
            why = "halved already" if self._halved else f"and the longest example has {self._longest}, more than half"
            raise UserError(
                f"Memory ran out in the {name} ({reason}) with batches of {before} tokens, {why}; {ADVICE}."
            )
        self.batch_tokens, self._halved = half, True
        where = f"ran out in the {name} ({reason})"
        keeper.begin_again(batch_tokens=half)
        self._own.save(HALVED, {}, {"batch_tokens": half, "device": self._device_is_short})
        if not calls_alone():
            raise UserError(
                f"Memory {where}; go on with --resume on as many ranks, with batches of {half} tokens then."
            )
        say(f"memory {where}; it starts again with batches of {half} tokens, not {before}.", of_rank=True)


def _key(name: str) -> str:
    """The file name of a pass's state."""
    return re.sub(r"[^\w.-]+", "-", name)


@contextmanager
def scoring_mode(model: PreTrainedModel, checkpointing: bool) -> Iterator[None]:
    """Evaluation mode with activation checkpointing, which layers otherwise do in training mode only.

    A layer asks its ``training`` flag whether to checkpoint, and may ask the same flag whether to drop out: the flag is
    set for the first question only.
    """
    model.eval()
    if not checkpointing:
        yield
        return
    from transformers.modeling_layers import GradientCheckpointingLayer  # slow to import

    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return _TrainingFlag(layers, False, then=True), _TrainingFlag(layers, False, then=True)

    checkpoint_activations(model, context_fn=contexts)
    try:
        with _TrainingFlag(layers, True, then=False):
            yield
    finally:
        checkpoint_activations(model)


class _TrainingFlag(AbstractContextManager[None]):
    """Sets the layers' flag while the context is open; it may be opened again, as differentiating twice does."""

    def __init__(self, layers: Sequence[nn.Module], flag: bool, then: bool) -> None:
        self._layers, self._flag, self._then = layers, flag, then

    def __enter__(self) -> None:
        for layer in self._layers:
            layer.training = self._flag

    def __exit__(self, *_: object) -> None:
        for layer in self._layers:
            layer.training = self._then
