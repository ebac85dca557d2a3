"""Phases of a run: a progress bar while one runs, and what it cost afterwards."""

import re
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from dualsft.data.layout import Batch
from dualsft.sharding.collectives import all_gather, is_rank_zero, world_size


@dataclass
class Phase:
    """One phase of a run.

    Attributes:
        name: What was done.
        examples: Examples passed, each as often as it was passed.
        tokens: Supervised tokens passed.
        seconds: Wall time.
        peak_memory_bytes: Peak memory of the phase: allocated on the accelerator if there is one, else the process's
            resident set.
    """

    name: str
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0


class PhaseLog:
    """The phases of one run, in order.

    Args:
        show: Whether to draw progress bars.
        device: Where the model is: whose memory counts.
    """

    def __init__(self, show: bool = True, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008
        self._device = device
        self.phases: list[Phase] = []
        self._show = show and is_rank_zero()

    @contextmanager
    def phase(
        self, name: str, examples: int, earlier: dict[str, Any] | None = None, dealt: bool = True
    ) -> Iterator["Meter"]:
        """Time a phase over this many examples; its batches go through the meter.

        Args:
            name: What is done.
            examples: How many examples will pass.
            earlier: What a killed run told of its part of the phase (`Meter.so_far`).
            dealt: Whether each rank passes examples of its own.
        """
        examples = -(-examples // world_size()) if dealt else examples
        phase = _phase_from(earlier) if earlier else Phase(name)
        _reset_peak_memory(self._device)
        done = phase.examples % max(examples, 1)  # an earlier round, in vain, may have passed them all
        bar = tqdm(total=examples, initial=done, desc=name, unit="ex", disable=not self._show, dynamic_ncols=True)
        with bar:
            yield (meter := Meter(phase, bar, self._device))
        self.phases.append(_of_all_ranks(_phase_from(meter.so_far()), dealt))

    def latest(self) -> dict[str, Any]:
        """The latest phase, as `restore` takes it."""
        return asdict(self.phases[-1])

    def restore(self, notes: dict[str, Any]) -> None:
        """Take over a phase that an earlier, killed run finished."""
        self.phases.append(_phase_from(notes))

    def as_json(self) -> list[dict[str, Any]]:
        """One object a phase, with its supervised tokens per second."""
        return [
            {**asdict(phase), "tokens_per_second": phase.tokens / phase.seconds if phase.seconds else 0.0}
            for phase in self.phases
        ]


class Meter:
    """Counts batches as they pass, and moves the bar.

    Args:
        phase: What an earlier run has passed already.
        bar: The progress bar.
        device: Whose memory counts.
    """

    def __init__(self, phase: Phase, bar: Any, device: torch.device) -> None:
        self._phase, self._bar, self._device = phase, bar, device
        self._start = time.perf_counter() - phase.seconds

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass the batches on; each counts once its work is done."""
        if self._bar.n >= self._bar.total:  # another round, as the last one was in vain
            self._bar.reset()
        for batch in batches:
            yield batch
            self._phase.examples += len(batch["example_id"])
            self._phase.tokens += int((batch["labels"] != -100).sum())
            rate = self._phase.tokens / (time.perf_counter() - self._start)
            self._bar.set_postfix_str(f"{rate:,.0f} supervised tok/s", refresh=False)
            self._bar.update(len(batch["example_id"]))

    def so_far(self) -> dict[str, Any]:
        """What has passed and what it cost, the part of an earlier run included."""
        peak = max(self._phase.peak_memory_bytes, peak_memory(self._device))
        return {**asdict(self._phase), "seconds": time.perf_counter() - self._start, "peak_memory_bytes": peak}


def say(message: str) -> None:
    """Tell the user something, once for all ranks, on a line of its own above the bar, if one is drawn."""
    if is_rank_zero():
        tqdm.write(f"dualsft: {message}", file=sys.stderr)


def _of_all_ranks(phase: Phase, dealt: bool) -> Phase:
    """What the ranks passed together, and the most memory that one of them took."""
    of_ranks = all_gather(phase)
    together = of_ranks if dealt else of_ranks[:1]
    return replace(
        phase,
        examples=sum(of.examples for of in together),
        tokens=sum(of.tokens for of in together),
        peak_memory_bytes=max(of.peak_memory_bytes for of in of_ranks),
    )


def _phase_from(notes: dict[str, Any]) -> Phase:
    return Phase(**{field.name: notes[field.name] for field in fields(Phase)})


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        with suppress(OSError):  # a container may forbid it; then the peak is the process's so far
            _CLEAR.write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on an accelerator, or resident on the host, since the phase began.

    Where the system cannot forget an earlier peak (anything but Linux), since the process began.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if _STATUS.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))
        if found:
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
