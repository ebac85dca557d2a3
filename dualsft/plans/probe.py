"""What a run on a few batches showed of each phase: its peak, beside the planned one, and the time of all data."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from dualsft.plans.job import FitJob, Job, SelectJob
from dualsft.plans.phase import Plan
from dualsft.plans.scoring import is_along_path
from dualsft.plans.sizes import gib
from dualsft.reports.words import counted, duration, short
from dualsft.runs.table import markdown_table

_NUMBERED = re.compile(r" (?:at point|at|half) [\d.]+(?: of \d+)?(?: of the path)?| (?:forward|backward)$")
"""What tells passes at different points of a path or of a difference, or over halves of a set, apart."""
_TO_SET = re.compile(r"^(.*) to .*$")
_BASE, _TRAINING = "base model's validation", "training"
_OF_SET = re.compile(r"^(validation .*) of .*$")


@dataclass(frozen=True)
class PhaseSeen:
    """A phase of the few batches.

    Attributes:
        name: As the run's log names it.
        peak: Bytes at its peak, above what the process held before the model was loaded; None if it was not measured.
        seconds: Its time without what its first batch takes longer.
        work: How much it did, in the unit of its progress; of a training, in batches.
    """

    name: str
    peak: int | None
    seconds: float
    work: float = 0.0


@dataclass(frozen=True)
class Seen:
    """A run on a few batches.

    Attributes:
        phases: In order.
        tokens: ``pool`` and ``validation`` -> the tokens that took part, and those that there are.
        reading: Seconds that reading and tokenising all data took.
        apart: Seconds apart from both: loading the model, the choice, writing.
    """

    phases: list[PhaseSeen]
    tokens: dict[str, tuple[int, int]]
    reading: float
    apart: float

    def as_json(self) -> str:
        """The text that `from_json` takes."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Seen":
        """What a probe wrote."""
        found = json.loads(text)
        return Seen(**{**found, "phases": [PhaseSeen(**phase) for phase in found["phases"]]})


def probe_text(job: Job, plan: Plan | None, seen: Seen) -> str:
    """The peaks and the times as a table, and the time of all of it."""
    planned = {phase.name: phase.peak for phase in plan.phases} if plan else {}
    rows = [["phase", "planned, GiB", "measured, GiB", "measured / planned", "time"]]
    total = seen.reading + seen.apart
    for name, of in _grouped(job, seen).items():
        seconds = sum(phase.seconds * _scale(job, seen, phase) for phase in of)
        total += seconds
        peak = max((phase.peak for phase in of if phase.peak is not None), default=None)
        both = peak is not None and name in planned
        rows.append(
            [
                name,
                gib(planned[name]) if name in planned else "",
                "" if peak is None else gib(peak),
                f"{peak / planned[name]:.2f}" if both and peak is not None else "",
                duration(seconds),
            ]
        )
    return f"{_heading(job, seen)}\n\n{markdown_table(rows)}\n\n{_rest(seen)}\nTime of all: {duration(total)}"


def _heading(job: Job, seen: Seen) -> str:
    told = ", ".join(f"{short(whole)} of {side}" for side, (_, whole) in seen.tokens.items() if whole)
    above = " Measured is what the process held above its state before the model was loaded." if _on_host(job) else ""
    return f"Probe: a few batches of each phase on this machine; times are for all data (tokens: {told}).{above}"


def _on_host(job: Job) -> bool:
    return job.machine.device == "cpu"


def _rest(seen: Seen) -> str:
    return (
        f"Beside the phases: {duration(seen.reading)} to read the data, {duration(seen.apart)} to load, choose and "
        "write, all of it done in the probe"
    )


def _grouped(job: Job, seen: Seen) -> dict[str, list[PhaseSeen]]:
    """The phases that count, by the name that they have in common."""
    found: dict[str, list[PhaseSeen]] = {}
    for phase in seen.phases:
        name = kind = kind_of(phase)
        if isinstance(job, FitJob) and kind == _BASE:
            name = counted(1 + _epochs(job, seen), "validation")
        if _passes(job, seen, kind):
            found.setdefault(name, []).append(phase)
    return found


def kind_of(phase: PhaseSeen) -> str:
    """A phase's name without the validation set, its half and the point of the path."""
    return _OF_SET.sub(r"\1", _TO_SET.sub(r"\1", _NUMBERED.sub("", phase.name)))


def _scale(job: Job, seen: Seen, phase: PhaseSeen) -> float:
    """How many times as long a phase takes over all data."""
    kind = kind_of(phase)
    sample, whole = seen.tokens["pool" if _is_of_pool(job, kind) else "validation"]
    times = _passes(job, seen, kind) * whole / sample if sample else 1.0
    if kind == _TRAINING and isinstance(job, FitJob) and job.batches is not None:
        return min(times, job.batches / phase.work)
    return times


def _is_of_pool(job: Job, kind: str) -> bool:
    """Whether a phase passes over the pool; the path is one of training."""
    if kind == "path":
        return _trains_on_pool(job)
    return not kind.startswith(("validation", "held-out", _BASE))


def _epochs(job: FitJob, seen: Seen) -> int:
    """How many epochs a fit ends, as far as the number of its batches lets it."""
    sample, whole = seen.tokens["pool"]
    work = sum(phase.work for phase in seen.phases if phase.name == _TRAINING)
    if job.batches is None or not sample or not work:
        return job.epochs
    return min(job.epochs, math.floor(job.batches * sample / (work * whole)))


def _passes(job: Job, seen: Seen, kind: str) -> float:
    """How many passes over its data a phase is, where the probe has made one."""
    if isinstance(job, FitJob):
        return {_TRAINING: job.epochs, _BASE: 1 + _epochs(job, seen), "validation": 0}.get(kind, 1)
    assert isinstance(job, SelectJob)
    warmup = job.settings.warmup
    if kind == "warm-up":
        return warmup.fraction * warmup.epochs
    if kind.startswith("prior "):
        return job.settings.prior.fraction
    return warmup.fraction if kind == "path" and _trains_on_pool(job) else 1.0


def _trains_on_pool(job: Job) -> bool:
    """Whether a job is a selection along a path of training on the pool."""
    return isinstance(job, SelectJob) and is_along_path(job) and job.settings.path_rule.trains_on == "pool"


def probe_options(job: Job) -> Iterator[str]:
    """The options of the probe's run in place of the job's: one pass over all of its few examples, and no loggers."""
    yield from ("--trainer.logger", "false")
    if isinstance(job, FitJob):
        yield from ("--trainer.max_epochs", "1", "--trainer.max_steps", "-1")
        return
    assert isinstance(job, SelectJob)
    settings = job.settings
    if settings.warmup.checkpoint is None and settings.warmup.fraction:
        yield from ("--model.warmup.fraction", "1", "--model.warmup.epochs", "1", "--model.warmup.keep", "false")
    if settings.prior.weight:
        yield from ("--model.prior.fraction", "1")
    if not settings.data_allocator.needs:  # it may miss what the few examples lack, as a source
        yield from ("--model.data_allocator", "top_k")
    if isinstance(settings.data_budget, int):
        yield from ("--model.data_budget", "0.5")
