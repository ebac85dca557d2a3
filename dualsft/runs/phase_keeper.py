"""The state of a phase under way, kept from time to time."""

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dualsft.runs.phase_store import PhaseStore
from dualsft.runs.progress import Meter, say
from dualsft.sharding.collectives import any_rank


class PhaseKeeper:
    """Saves the state of a phase in progress at intervals of minutes; implements `Keeper` of passes and trainings.

    Attributes:
        name: The name of the state.
        about: Noted in every state; one with other notes is of other work, and counts for its cost alone.
        halved: Whether a rank ran out of memory in it among shards, so that all that share its state take half batches.
        earlier: The phase's cost before its present start, in a killed run or a discarded attempt; {} for a new one.
        meter: Measures the phase's cost, from its start.
    """

    def __init__(self, store: PhaseStore, phase: str, minutes: float, **about: Any) -> None:
        self._store, self.name, self._seconds = store, f"{phase}.under-way", 60 * minutes
        self._loaded, self.about = store.load_own(self.name), about
        self._mark = f"{phase}.halved"
        self.halved = any_rank(store.own().load(self._mark) is not None, store.group)
        self._last_save = time.monotonic()
        self.earlier: dict[str, Any] = self._loaded[1] if self._loaded else {}
        self.meter: Meter | None = None
        if self.earlier and any(self.earlier.get(key) != value for key, value in about.items()):
            self.earlier = {**self.earlier, "examples": 0, "tokens": 0}
            self.drop()

    def load(self) -> tuple[Mapping[str, Tensor], dict[str, Any]] | None:
        """The state that an earlier, killed run saved; returned once, so that it is not held in memory."""
        loaded, self._loaded = self._loaded, None
        return loaded

    def due(self) -> bool:
        """Whether it is time to save the state again."""
        return time.monotonic() - self._last_save >= self._seconds

    def save(self, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Save the state, with the phase's cost so far; where the disk has no room for it, say so and do without."""
        assert self.meter is not None
        if self._store.make_room(sum(tensor.nbytes for tensor in tensors.values()), [self.name]):
            self._store.save(self.name, tensors, {**notes, **self.about, **self.meter.so_far()})
        else:
            say(f"the disk has no room for the state of the {self.name}: after a kill this phase would start again.")
        self._last_save = time.monotonic()

    def halve(self) -> None:
        """Have all ranks take batches in halves when the run is resumed; said by one, as the others cannot answer."""
        self._store.own().save(self._mark, {}, {})

    def begin_again(self, **about: Any) -> None:
        """Discard the saved state, but keep the time spent on it; what comes now is about this."""
        assert self.meter is not None
        self.about = about
        self.earlier = {**self.meter.so_far(), "examples": 0, "tokens": 0}
        self.drop()

    def drop(self) -> None:
        """Discard the saved state."""
        self._loaded = None
        self._store.drop(self.name)
