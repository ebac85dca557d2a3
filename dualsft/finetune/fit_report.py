"""The report of a fit, interruptions included, as figures and as a table.

On several ranks the figures are those of the job, as every rank knows what a batch holds on all ranks; peak memory is
that of the rank with the most.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, SupportsFloat, cast

import torch
from lightning import Callback, LightningModule, Trainer

from dualsft.data.dealing import extent_of
from dualsft.finetune.batch_losses import BatchLosses
from dualsft.runs.progress import peak_memory
from dualsft.runs.table import markdown_table
from dualsft.sharding.collectives import all_reduce_max

_BATCHES = 10  # single batches' losses differ by what is in them more than by what has been learnt


@dataclass
class Progress:
    """The part of the report that checkpoints hold.

    Attributes:
        examples: Examples trained on, each as often as it was.
        tokens: Supervised tokens trained on.
        seconds: Wall time of the run.
        training_seconds: Wall time of training batches, their steps included.
        first: The training losses of the first batches; on the device until they are needed.
        last: The training losses of the last batches, likewise.
        base: Validation metrics of the base model, if it was validated on all that later models are.
        validated: Validation metrics by optimizer step.
    """

    batches: int = 0
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    peak_memory_bytes: int = 0
    first: Sequence[SupportsFloat] = ()
    last: Sequence[SupportsFloat] = ()
    base: dict[str, float] | None = None
    validated: dict[int, dict[str, float]] = field(default_factory=dict)


class FitReport(Callback):
    """Counts and times a fit; its state is in the checkpoints, so that a resumed run reports on all of the fit."""

    def __init__(self) -> None:
        self._progress = Progress()
        self._start = self._batch_start = 0.0
        self._device = torch.device("cpu")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start, self._device = time.perf_counter(), pl_module.device

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the base model's metrics if the check covered all batches; a resumed run would check a trained model."""
        if (
            trainer.global_step == 0
            and trainer.num_sanity_val_batches == trainer.fit_loop.epoch_loop.val_loop.max_batches
        ):
            self._progress.base = _validation_metrics(trainer) or None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of this step."""
        if not trainer.sanity_checking:
            self._progress.validated[trainer.global_step] = _validation_metrics(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the batch's clock."""
        self._batch_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch."""
        losses = cast(BatchLosses, pl_module.batch_losses)
        progress, loss = self._progress, losses.latest["train_loss"]
        progress.training_seconds += time.perf_counter() - self._batch_start
        progress.batches += 1
        extent = extent_of(batch)
        progress.examples += len(extent.ids)
        progress.tokens += extent.supervised
        progress.first = [*progress.first, loss][:_BATCHES]
        progress.last = [*progress.last, loss][-_BATCHES:]

    def state_dict(self) -> dict[str, Any]:
        """The figures so far."""
        return asdict(self._so_far())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from these figures."""
        self._progress = Progress(**state_dict)

    def _so_far(self) -> Progress:
        now = {**vars(self._progress)}
        now |= {name: [float(loss) for loss in now[name]] for name in ("first", "last")}
        now["seconds"] += time.perf_counter() - self._start
        now["peak_memory_bytes"] = max(now["peak_memory_bytes"], all_reduce_max(peak_memory(self._device)))
        return Progress(**now)

    def figures(self, trainer: Trainer, module: Any) -> dict[str, Any]:
        """All figures of a finished fit of a `MaskedFinetuneModule`; every rank must call this."""
        progress = self._so_far()
        exported = trainer.global_step if module.best_step is None else module.best_step
        step = max((step for step in progress.validated if step <= exported), default=None)
        return {
            "weights": {"trained": module.compact.num_selected, "all": module.model.num_parameters()},
            "examples": {"each_epoch": _examples(trainer), "passed": progress.examples},
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "exported_step": exported,
            "train_loss": _train_loss(progress),
            "validation": {
                "base": progress.base,
                "step": step,
                "metrics": None if step is None else progress.validated[step],
            },
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "tokens_per_second": progress.tokens / progress.training_seconds if progress.training_seconds else 0.0,
            "peak_memory_bytes": progress.peak_memory_bytes,
        }


def _validation_metrics(trainer: Trainer) -> dict[str, float]:
    metrics = trainer.callback_metrics.items()
    return {name.removeprefix("val_"): float(value) for name, value in metrics if name.startswith("val_")}


def _examples(trainer: Trainer) -> int:
    """How many examples an epoch has."""
    batches = list(trainer.train_dataloader.sampler)  # type: ignore[union-attr]
    return sum(1 if isinstance(row, int) else len(row) for batch in batches for row in batch)


def _train_loss(progress: Progress) -> dict[str, Any]:
    """The mean loss of the first and of the last batches, equally many and without overlap."""
    count = max(1, min(_BATCHES, progress.batches // 2))
    parts = {"first": [*progress.first][:count], "last": [*progress.last][-count:]}
    means = {name: sum(map(float, losses)) / len(losses) if losses else None for name, losses in parts.items()}
    return {"batches": count, **means}


def report(figures: Mapping[str, Any]) -> str:
    """The figures for the terminal: a table of the validation metrics, then one line for each other topic."""
    weights, examples, loss = figures["weights"], figures["examples"], figures["train_loss"]
    lines = [
        *_validation_table(figures["validation"]),
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


def _validation_table(validation: Mapping[str, Any]) -> list[str]:
    """Metrics of the base model and of the exported one's last validation; means over named sets come first."""
    after, base, step = validation["metrics"] or {}, validation["base"] or {}, validation["step"]
    if not after and not base:
        return []
    rows = [["validation", "base model", "-" if step is None else f"step {step:,}"]]
    rows += [[name, _number(base.get(name)), _number(after.get(name))] for name in (after or base)]
    return [markdown_table(rows)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
