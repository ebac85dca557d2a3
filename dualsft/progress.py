"""Phases of a run: a progress bar while one runs, and what it cost afterwards."""

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from tqdm.auto import tqdm

from dualsft.objective import Batch


@dataclass
class Phase:
    """One phase of a run.

    Attributes:
        name: What was done.
        examples: Examples passed, each as often as it was passed.
        tokens: Supervised tokens passed.
        seconds: Wall time.
        peak_memory_bytes: Peak memory by the end of the phase: allocated on the accelerator if there is one, else the
            process's resident set.
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
        self._show = show

    @contextmanager
    def phase(self, name: str, examples: int) -> Iterator["Meter"]:
        """Time a phase over this many examples; its batches go through the meter."""
        phase, start = Phase(name), time.perf_counter()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        with tqdm(total=examples, desc=name, unit="ex", disable=not self._show, dynamic_ncols=True) as bar:
            yield Meter(phase, bar)
        phase.seconds = time.perf_counter() - start
        phase.peak_memory_bytes = _peak_memory(self._device)
        self.phases.append(phase)

    def take(self) -> dict[str, Any]:
        """Remove the latest phase and return it as `restore` takes it."""
        return asdict(self.phases.pop())

    def restore(self, notes: dict[str, Any]) -> None:
        """Take over a phase that an earlier, killed run finished."""
        self.phases.append(Phase(**{field.name: notes[field.name] for field in fields(Phase)}))

    def as_json(self) -> list[dict[str, Any]]:
        """One object a phase."""
        return [asdict(phase) for phase in self.phases]


class Meter:
    """Counts batches as they pass, and moves the bar."""

    def __init__(self, phase: Phase, bar: Any) -> None:
        self._phase, self._bar = phase, bar
        self._start = time.perf_counter()

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass the batches on; each counts once its work is done."""
        for batch in batches:
            yield batch
            self._phase.examples += len(batch["labels"])
            self._phase.tokens += int((batch["labels"] != -100).sum())
            rate = self._phase.tokens / (time.perf_counter() - self._start)
            self._bar.set_postfix_str(f"{rate:,.0f} supervised tok/s", refresh=False)
            self._bar.update(len(batch["labels"]))


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
