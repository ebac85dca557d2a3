"""Progress bars for the phases of a run, and each phase's cost."""

import re
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
    """The cost of one phase of a run.

    Attributes:
        examples: Examples processed, each as often as it was processed.
        tokens: Supervised tokens processed.
        seconds: Wall time.
        peak_memory_bytes: As `peak_memory` measures it.
    """

    name: str
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0


class PhaseLog:
    """The phases of one run, in order, with progress bars if wanted; peak memory is that of the model's device."""

    def __init__(self, show: bool = True, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008
        self._device = device
        self.phases: list[Phase] = []
        self._show = show and is_rank_zero()

    @contextmanager
    def phase(
        self, name: str, examples: int, earlier: dict[str, Any] | None = None, dealt: bool = True
    ) -> Iterator["Meter"]:
        """Measure a phase of this many examples; its batches go through the meter.

        The cost of the part that a killed run finished (`Meter.so_far`) is ``earlier``; the examples are ``dealt`` if
        each rank processes its own.
        """
        examples = -(-examples // world_size()) if dealt else examples
        phase = _phase_from(earlier) if earlier else Phase(name)
        reset_peak_memory(self._device)
        done = phase.examples % max(examples, 1)  # an earlier, discarded attempt may have processed them all
        bar = tqdm(total=examples, initial=done, desc=name, unit="ex", disable=not self._show, dynamic_ncols=True)
        with bar:
            yield (meter := Meter(phase, bar, self._device))
        self.phases.append(_of_all_ranks(_phase_from(meter.so_far()), dealt))

    def latest(self) -> dict[str, Any]:
        """The latest phase, as an argument for `restore`."""
        return asdict(self.phases[-1])

    def restore(self, notes: dict[str, Any]) -> None:
        """Append a phase that an earlier, killed run finished."""
        self.phases.append(_phase_from(notes))

    def as_json(self) -> list[dict[str, Any]]:
        """The phases as JSON objects, each with its supervised tokens per second."""
        return [
            {**asdict(phase), "tokens_per_second": phase.tokens / phase.seconds if phase.seconds else 0.0}
            for phase in self.phases
        ]


class Meter:
    """Counts the batches of a phase, and advances its bar; ``phase`` holds the cost in an earlier run."""

    def __init__(self, phase: Phase, bar: Any, device: torch.device) -> None:
        self._phase, self._bar, self._device = phase, bar, device
        self._start = time.perf_counter() - phase.seconds

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches; each is counted once its work is done."""
        if self._bar.n >= self._bar.total:  # a new attempt: the last one was discarded
            self._bar.reset()
        for batch in batches:
            yield batch
            self._phase.examples += len(batch["example_id"])
            self._phase.tokens += int((batch["labels"] != -100).sum())
            rate = self._phase.tokens / (time.perf_counter() - self._start)
            self._bar.set_postfix_str(f"{rate:,.0f} supervised tok/s", refresh=False)
            self._bar.update(len(batch["example_id"]))

    def so_far(self) -> dict[str, Any]:
        """The cost of the phase so far, including that of an earlier run."""
        peak = max(self._phase.peak_memory_bytes, peak_memory(self._device))
        return {**asdict(self._phase), "seconds": time.perf_counter() - self._start, "peak_memory_bytes": peak}


def say(message: str) -> None:
    """Print a message to stderr on rank zero, on a line of its own above the progress bar."""
    if is_rank_zero():
        tqdm.write(f"dualsft: {message}", file=sys.stderr)


def _of_all_ranks(phase: Phase, dealt: bool) -> Phase:
    """The examples and tokens of all ranks together, and the largest peak memory of a rank."""
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


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` start anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        with suppress(OSError):  # a container may forbid it; then the peak is that of the process so far
            _CLEAR.write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated on an accelerator, or resident on the host.

    On an accelerator and on Linux it is the peak since the last reset, as at the beginning of a phase; on other systems
    since the process began.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if _STATUS.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))):
        return int(found[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
