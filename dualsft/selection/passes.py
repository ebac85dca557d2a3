"""Gradient passes of a run: resumed after a kill, and begun again with half the batch when memory runs out."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from dualsft.data.layout import Batch
from dualsft.errors import UserError, is_out_of_memory, shortage
from dualsft.matrix.pass_result import GradientPass
from dualsft.matrix.passes import gradient_pass
from dualsft.runs.folder import RunFolder
from dualsft.runs.keeping import PhaseKeeper
from dualsft.runs.progress import PhaseLog, say
from dualsft.selection.scoring_mode import scoring_mode
from dualsft.sharding.collectives import rank, world_size

Loader = Callable[[int, int, int], Iterable[Batch]]
"""(first batch, batch_tokens, step) -> that batch and each that so many batches later follows."""

ADVICE = (
    "set model.gradient_checkpointing and go on with --resume, or start anew (--overwrite) with a lower "
    "data.batch_tokens or data.max_length, or with model.dtype bfloat16"
)
_HALVED = "halved"


class Passes:
    """Runs gradient passes as phases of a run.

    Args:
        model: The model at the scoring checkpoint.
        run: Keeps the state of finished passes, of the one under way, and whether the batches have been halved.
        log: Keeps what each pass cost, and shows progress.
        batch_tokens: The largest batch.
        longest: Tokens of the longest example of any pass.
        checkpointing: Whether to recompute activations in the backward pass.
        save_minutes: How often to keep the state of the pass under way.

    Attributes:
        batch_tokens: The largest batch; halved once if memory runs out, in this run or before it was killed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        run: RunFolder,
        log: PhaseLog,
        batch_tokens: int,
        longest: int,
        checkpointing: bool,
        save_minutes: float,
    ) -> None:
        self._model, self._run, self._log = model, run, log
        self._longest, self._checkpointing, self._save_minutes = longest, checkpointing, save_minutes
        halved = run.load(_HALVED)
        self._halved = halved is not None
        self.batch_tokens: int = halved[1]["batch_tokens"] if halved else batch_tokens

    def run(self, name: str, examples: int, loader: Loader, **options: Any) -> GradientPass:
        """One pass; an earlier run's, if it finished it. Its sums are on the host, in a file until they are used.

        Args:
            name: What the pass is called in the log.
            examples: How many examples will pass.
            loader: Gives the batches.
            **options: For `gradient_pass`.

        Raises:
            UserError: if an example cannot be scored, or memory runs out for the second time.
        """
        if (finished := self.finished(name)) is not None:
            return finished
        keeper = PhaseKeeper(self._run, _key(name), self._save_minutes)
        while (found := self._attempt(name, examples, loader, keeper, options)) is None:
            pass
        tensors, notes = found.state()
        self._run.save(_key(name), tensors, {**notes, **self._log.latest()})
        del found, tensors  # the sums leave the device, and the host's memory if need be
        keeper.drop()
        saved = self._run.load(_key(name))
        assert saved is not None
        return GradientPass.from_state(*saved)

    def finished(self, name: str) -> GradientPass | None:
        """The pass of this name, if an earlier run finished it."""
        if (saved := self._run.load(_key(name))) is None:
            return None
        self._log.restore(saved[1])
        PhaseKeeper(self._run, _key(name), self._save_minutes).drop()
        return GradientPass.from_state(*saved)

    def _attempt(
        self, name: str, examples: int, loader: Loader, keeper: PhaseKeeper, options: dict[str, Any]
    ) -> GradientPass | None:
        """The pass, or None when memory has run out and it is to be begun again."""
        try:
            with (
                self._log.phase(name, examples, keeper.earlier) as keeper.meter,
                scoring_mode(self._model, self._checkpointing),
            ):
                return gradient_pass(
                    self._model,
                    lambda first: loader(first * world_size() + rank(), self.batch_tokens, world_size()),
                    keeper.meter,
                    keeper=keeper,
                    **options,
                )
        except Exception as error:
            if not is_out_of_memory(error) or world_size() > 1:  # the other ranks are in the middle of the pass
                raise
            reason = shortage(error)
        # outside the handler, whose traceback holds on to the batch
        self._clean_up()
        self._halve(name, reason)
        keeper.begin_again()
        # not before the state of the larger batches is gone: theirs is another order
        self._run.save(_HALVED, {}, {"batch_tokens": self.batch_tokens})
        return None

    def _clean_up(self) -> None:
        """Leave nothing of a failed backward behind."""
        for parameter in self._model.parameters():
            parameter.grad = None
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _halve(self, name: str, reason: str) -> None:
        before, half = self.batch_tokens, self.batch_tokens // 2
        if self._halved or half < self._longest:
            why = "halved already" if self._halved else f"and the longest example has {self._longest}, more than half"
            raise UserError(
                f"Memory ran out in the {name} ({reason}) with batches of {before} tokens, {why}; {ADVICE}."
            )
        self.batch_tokens, self._halved = half, True
        say(f"memory ran out in the {name} ({reason}); it starts again with batches of {half} tokens, not {before}.")


def _key(name: str) -> str:
    """The name of a pass as that of a file."""
    return re.sub(r"[^\w.-]+", "-", name)
