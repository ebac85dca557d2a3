"""The state of a phase under way: kept every so often, the old one until the new one is whole."""

import time
from typing import Any

from torch import Tensor

from dualsft.runs.folder import RunFolder
from dualsft.runs.progress import Meter


class PhaseKeeper:
    """Keeps one phase's state in the run's folder; a `dualsft.matrix.passes.Keeper`.

    Args:
        run: The run.
        phase: The phase's name in the folder.
        minutes: How often to keep the state.

    Attributes:
        earlier: What the phase has cost before its present start, in a killed run or for nothing; empty if it is new.
        meter: Measures what the phase costs, from its start.
    """

    def __init__(self, run: RunFolder, phase: str, minutes: float) -> None:
        self._run, self._name, self._seconds = run, f"{phase}.under-way", 60 * minutes
        self._kept = run.load(self._name)
        self._last = time.monotonic()
        self.earlier: dict[str, Any] = self._kept[1] if self._kept else {}
        self.meter: Meter | None = None

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What an earlier, killed run kept; handed out once, so that it is not held in memory."""
        kept, self._kept = self._kept, None
        return kept

    def due(self) -> bool:
        """Whether it is time to keep the state again."""
        return time.monotonic() - self._last >= self._seconds

    def save(self, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Keep the state, with what the phase has cost so far."""
        assert self.meter is not None
        self._run.save(self._name, tensors, {**notes, **self.meter.so_far()})
        self._last = time.monotonic()

    def begin_again(self) -> None:
        """Forget what has been kept, but not the time it took."""
        assert self.meter is not None
        self.earlier = {**self.meter.so_far(), "examples": 0, "tokens": 0}
        self.drop()

    def drop(self) -> None:
        """Forget what has been kept."""
        self._kept = None
        self._run.drop(self._name)
