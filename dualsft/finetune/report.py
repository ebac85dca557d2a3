"""What a fit did from its first step to its last, however often it was interrupted, as figures and as a table.

On many ranks the figures are those of the whole job: every rank is given all batches. Memory is the largest of a rank.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from dualsft.runs.progress import peak_memory
from dualsft.sharding.collectives import all_reduce_max

_BATCHES = 10  # single batches' losses differ by what is in them more than by what has been learnt


@dataclass
class Progress:
    """What a checkpoint keeps of the report.

    Attributes:
        batches: Batches trained on.
        examples: Examples trained on, each as often as it was.
        tokens: Supervised tokens trained on.
        seconds: Wall time of the run.
        training_seconds: Of which in training batches, their steps included.
        peak_memory_bytes: See `peak_memory`.
        first: The training losses of the first batches.
        last: Of the last ones.
        base: Validation metrics of the base model, if it was validated on all that later models are.
        validated: Validation metrics by optimizer step.
    """

    batches: int = 0
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    peak_memory_bytes: int = 0
    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    base: dict[str, float] | None = None
    validated: dict[int, dict[str, float]] = field(default_factory=dict)


class FitReport(Callback):
    """Counts and measures; its state is in the checkpoints, so that a resumed run tells of the whole."""

    def __init__(self) -> None:
        self._progress = Progress()
        self._start = self._batch_start = 0.0
        self._device = torch.device("cpu")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start, self._device = time.perf_counter(), pl_module.device

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the base model gives, if the check went through all batches; a resumed run may have one, too."""
        if (
            trainer.global_step == 0
            and trainer.num_sanity_val_batches == trainer.fit_loop.epoch_loop.val_loop.max_batches
        ):
            self._progress.base = _validation_metrics(trainer) or None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the model gives now."""
        if not trainer.sanity_checking:
            self._progress.validated[trainer.global_step] = _validation_metrics(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the batch's clock."""
        self._batch_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count it in."""
        progress, loss = self._progress, float(trainer.callback_metrics["train_loss"])
        progress.training_seconds += time.perf_counter() - self._batch_start
        progress.batches += 1
        progress.examples += len(batch["example_id"])
        progress.tokens += int((batch["labels"] != -100).sum())
        progress.first = [*progress.first, loss][:_BATCHES]
        progress.last = [*progress.last, loss][-_BATCHES:]

    def state_dict(self) -> dict[str, Any]:
        """The figures so far."""
        return asdict(self._so_far())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from them."""
        self._progress = Progress(**state_dict)

    def _so_far(self) -> Progress:
        now = {**vars(self._progress)}
        now["seconds"] += time.perf_counter() - self._start
        now["peak_memory_bytes"] = max(now["peak_memory_bytes"], all_reduce_max(peak_memory(self._device)))
        return Progress(**now)

    def figures(self, trainer: Trainer, module: Any) -> dict[str, Any]:
        """All figures of a finished fit; every rank must ask at once.

        Args:
            trainer: What it ran under.
            module: The `MaskedFinetuneModule`.
        """
        done = self._so_far()
        kept = trainer.global_step if module.kept_step is None else module.kept_step
        step = max((step for step in done.validated if step <= kept), default=None)
        return {
            "weights": {
                "trained": module.compact.num_selected(),
                "all": sum(w.numel() for w in module.model.parameters()),
            },
            "examples": {"each_epoch": _examples(trainer), "passed": done.examples},
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "exported_step": kept,
            "train_loss": _train_loss(done),
            "validation": {"base": done.base, "step": step, "metrics": None if step is None else done.validated[step]},
            "tokens": done.tokens,
            "seconds": done.seconds,
            "tokens_per_second": done.tokens / done.training_seconds if done.training_seconds else 0.0,
            "peak_memory_bytes": done.peak_memory_bytes,
        }


def _validation_metrics(trainer: Trainer) -> dict[str, float]:
    metrics = trainer.callback_metrics.items()
    return {name.removeprefix("val_"): float(value) for name, value in metrics if name.startswith("val_")}


def _examples(trainer: Trainer) -> int:
    """How many examples an epoch has."""
    batches = list(trainer.train_dataloader.sampler)  # type: ignore[union-attr]
    return sum(1 if isinstance(row, int) else len(row) for batch in batches for row in batch)


def _train_loss(done: Progress) -> dict[str, Any]:
    """Means over as many batches at either end, none in both."""
    count = max(1, min(_BATCHES, done.batches // 2))
    first, last = done.first[:count], done.last[-count:]
    return {"batches": count, **{name: _mean(losses) for name, losses in (("first", first), ("last", last))}}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def report(figures: Mapping[str, Any]) -> str:
    """The figures for the terminal: a table of the validation metrics, and a line for each other matter."""
    weights, examples, loss = figures["weights"], figures["examples"], figures["train_loss"]
    lines = [
        *_validation_table(figures),
        f"train loss  {_number(loss['first'])} -> {_number(loss['last'])} "
        f"(mean of the first and of the last {loss['batches']} batches)",
        f"weights     {weights['trained']:,} of {weights['all']:,} trained ({weights['trained'] / weights['all']:.1%})",
        f"examples    {examples['each_epoch']:,} an epoch, {examples['passed']:,} in all",
        f"steps       {figures['steps']:,} in {figures['epochs']:,} epochs, of which step "
        f"{figures['exported_step']:,} is exported",
        f"time        {figures['seconds']:.1f} s; {figures['tokens']:,} supervised tokens, "
        f"{figures['tokens_per_second']:,.0f} a second in training",
        f"memory      {figures['peak_memory_bytes'] / 2**20:,.0f} MiB peak",
    ]
    return "\n".join(lines)


def _validation_table(figures: Mapping[str, Any]) -> list[str]:
    """Metric by metric, the mean over named sets first: the base model, and what was validated last of what is kept."""
    told = figures["validation"]
    if told["metrics"] is None and told["base"] is None:
        return []
    after, base = told["metrics"] or {}, told["base"] or {}
    rows = [["validation", "base model", "-" if told["step"] is None else f"step {told['step']:,}"]]
    rows += [[name, _number(base.get(name)), _number(after.get(name))] for name in (after or base)]
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    cells = [f"{row[0]:<{widths[0]}} | {row[1]:>{widths[1]}} | {row[2]:>{widths[2]}}" for row in rows]
    rule = " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return [f"| {line} |" for line in [cells[0], rule, *cells[1:]]]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
