"""The phases of a run: their cost, and how far each is."""

import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from dualsft.data.dealing import extent_of
from dualsft.data.layout import Batch
from dualsft.data.loaders import ScoringLoader
from dualsft.runs.bar import Bar
from dualsft.runs.bars import bar, numbered
from dualsft.sharding.collectives import all_gather, is_rank_zero
from dualsft.sharding.groups import rank, world_size


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
    """The phases of one run, in order.

    Args:
        show: Whether to show progress.
        device: The model's device, whose peak memory counts.
        planned: How many phases there will be, if that is known.
    """

    def __init__(
        self,
        show: bool = True,
        device: torch.device = torch.device("cpu"),  # noqa: B008
        planned: int | None = None,
    ) -> None:
        self._device, self._planned = device, planned
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
        title = numbered(name, len(self.phases) + 1, self._planned)
        with bar(title, examples, done, phase.seconds, self._show) as shown:
            yield (meter := Meter(phase, shown, self._device))
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
    """Counts the batches of a phase, and advances its bar; ``phase`` holds the cost in an earlier run.

    Where the longest examples come first the bar counts tokens, as the last half of the examples may be a tenth of the
    work; elsewhere it counts examples.
    """

    def __init__(self, phase: Phase, bar: Bar, device: torch.device) -> None:
        self._phase, self._bar, self._device = phase, bar, device
        self._begun = time.perf_counter()
        self._start, self._tokens = self._begun - phase.seconds, 0

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches; each is counted once its work is done."""
        by_tokens = isinstance(batches, ScoringLoader)
        if isinstance(batches, ScoringLoader):
            self._bar.set(batches.skipped_tokens, batches.all_tokens)
        elif self._bar.share == 1:  # a new attempt: the last one was discarded
            self._bar.set(0, self._bar.total)
        for batch in batches:
            yield batch
            extent = extent_of(batch)
            self._phase.examples += len(extent.ids)
            self._phase.tokens += extent.supervised
            self._tokens += extent.tokens
            rate = self._tokens / (time.perf_counter() - self._begun)
            self._bar.advance(extent.tokens if by_tokens else len(extent.ids), f"{rate:,.0f} tok/s")

    def so_far(self) -> dict[str, Any]:
        """The cost of the phase so far, including that of an earlier run."""
        peak = max(self._phase.peak_memory_bytes, peak_memory(self._device))
        return {**asdict(self._phase), "seconds": time.perf_counter() - self._start, "peak_memory_bytes": peak}


def say(message: str, of_rank: bool = False) -> None:
    """Print a message to stderr, on a line of its own above the progress bar.

    Rank zero prints it, or, where it is ``of_rank``, each rank for itself.
    """
    if of_rank or is_rank_zero():
        place = "" if is_rank_zero() else f" (rank {rank()})"
        print(f"dualsft{place}: {message}", file=sys.stderr, flush=True)  # an open bar makes room for it


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
