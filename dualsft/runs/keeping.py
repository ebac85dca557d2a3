"""Saving the state of a phase under way, every few minutes."""

import time
from typing import Any

from torch import Tensor

from dualsft.runs.folder import RunFolder
from dualsft.runs.progress import Meter


class PhaseKeeper:
    """Saves one phase's state to the run's folder; implements `dualsft.matrix.passes.Keeper`.

    Args:
        run: The run.
        phase: The phase's name in the folder.
        minutes: The time between two saves.

    Attributes:
        earlier: What the phase cost before its present start, in a killed run or in a discarded attempt; empty for a
            new phase.
        meter: Measures what the phase costs, from its start.
    """

    def __init__(self, run: RunFolder, phase: str, minutes: float) -> None:
        self._run, self._name, self._seconds = run, f"{phase}.under-way", 60 * minutes
        self._loaded = run.load(self._name)
        self._last_save = time.monotonic()
        self.earlier: dict[str, Any] = self._loaded[1] if self._loaded else {}
        self.meter: Meter | None = None

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state that an earlier, killed run saved; returned once, so that it is not held in memory."""
        loaded, self._loaded = self._loaded, None
        return loaded

    def due(self) -> bool:
        """Whether it is time to save the state again."""
        return time.monotonic() - self._last_save >= self._seconds

    def save(self, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Save the state, with what the phase has cost so far."""
        assert self.meter is not None
        self._run.save(self._name, tensors, {**notes, **self.meter.so_far()})
        self._last_save = time.monotonic()

    def begin_again(self) -> None:
        """Discard the saved state, but not the time that it took."""
        assert self.meter is not None
        self.earlier = {**self.meter.so_far(), "examples": 0, "tokens": 0}
        self.drop()

    def drop(self) -> None:
        """Discard the saved state."""
        self._loaded = None
        self._run.drop(self._name)
