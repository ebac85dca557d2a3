"""Gradient passes of a run: resumed after a kill, and begun again with half the batch when memory runs out."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from dualsft.errors import UserError, is_out_of_memory
from dualsft.gradients import GradientPass, gradient_pass
from dualsft.layout import Batch
from dualsft.progress import PhaseLog
from dualsft.run_folder import RunFolder
from dualsft.selection.keeping import PhaseKeeper
from dualsft.selection.scoring_mode import scoring_mode

Loader = Callable[[int, int], Iterable[Batch]]
"""(first batch, batch_tokens) -> the batches from that one on."""

ADVICE = "lower data.batch_tokens or data.max_length, set model.gradient_checkpointing, or load the model in bfloat16"


class Passes:
    """Runs gradient passes as phases of a run.

    Args:
        model: The model at the scoring checkpoint.
        run: Keeps the state of finished passes, and of the one under way.
        log: Keeps what each pass cost, and shows progress.
        batch_tokens: The largest batch.
        checkpointing: Whether to recompute activations in the backward pass.
        save_minutes: How often to keep the state of the pass under way.

    Attributes:
        batch_tokens: The largest batch; halved once if memory runs out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        run: RunFolder,
        log: PhaseLog,
        batch_tokens: int,
        checkpointing: bool,
        save_minutes: float,
    ) -> None:
        self._model, self._run, self._log = model, run, log
        self._checkpointing, self._save_minutes = checkpointing, save_minutes
        self.batch_tokens, self._halved = batch_tokens, False

    def run(self, name: str, examples: int, loader: Loader, **options: Any) -> GradientPass:
        """One pass; an earlier run's, if it finished it.

        Args:
            name: What the pass is called in the log.
            examples: How many examples will pass.
            loader: Gives the batches.
            **options: For `gradient_pass`.

        Raises:
            UserError: if an example cannot be scored, or memory runs out for the second time.
        """
        key = name.replace(" ", "-")
        if (saved := self._run.load(key)) is not None:
            return self._restore(*saved)
        keeper = PhaseKeeper(self._run, key, self._save_minutes)
        while (found := self._attempt(name, examples, loader, keeper, options)) is None:
            keeper.drop()
        tensors, notes = found.state()
        cost = self._log.take()
        self._run.save(key, tensors, {**notes, **cost, **self._batch_notes()})
        self._log.restore(cost)
        keeper.drop()
        return found

    def _attempt(
        self, name: str, examples: int, loader: Loader, keeper: PhaseKeeper, options: dict[str, Any]
    ) -> GradientPass | None:
        """The pass, or None when memory has run out and it is to be begun again."""
        self._adopt(keeper.earlier)
        keeper.notes = self._batch_notes()
        try:
            with (
                self._log.phase(name, examples, keeper.earlier) as watch,
                scoring_mode(self._model, self._checkpointing),
            ):
                keeper.meter = watch
                return gradient_pass(
                    self._model, lambda first: loader(first, self.batch_tokens), watch, keeper=keeper, **options
                )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().split("\n")[0] or type(error).__name__
        self._halve(name, reason, loader)  # outside the handler, whose traceback holds on to the batch
        return None

    def _halve(self, name: str, reason: str, loader: Loader) -> None:
        if self._halved or not _can_batch(loader, self.batch_tokens // 2):
            why = "too" if self._halved else "and the longest example does not fit into half of that"
            raise UserError(
                f"Memory ran out in the {name} at data.batch_tokens={self.batch_tokens} {why} ({reason}); {ADVICE}."
            )
        before, self.batch_tokens, self._halved = self.batch_tokens, self.batch_tokens // 2, True
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        print(
            f"dualsft: memory ran out in the {name} ({reason}); it starts again with data.batch_tokens "
            f"{self.batch_tokens} instead of {before}.",
            file=sys.stderr,
        )

    def _batch_notes(self) -> dict[str, Any]:
        return {"batch_tokens": self.batch_tokens, "halved": self._halved}

    def _adopt(self, notes: dict[str, Any]) -> None:
        """Keep to the batches that an earlier run was brought to."""
        if notes.get("halved"):
            self.batch_tokens, self._halved = notes["batch_tokens"], True

    def _restore(self, tensors: dict[str, torch.Tensor], notes: dict[str, Any]) -> GradientPass:
        self._adopt(notes)
        self._log.restore(notes)
        found = GradientPass.from_state(tensors, notes)
        found.sums = {name: total.to(self._model.device) for name, total in found.sums.items()}
        return found


def _can_batch(loader: Loader, batch_tokens: int) -> bool:
    try:
        loader(0, batch_tokens)
    except UserError:
        return False
    return True
