"""The state of a run's phases, in files: each state is saved completely or not at all, by one process or by all ranks.

Every rank saves its own part in a file. A state counts once all ranks have saved theirs. Until then the state before
it stays, so that the states that a killed run leaves are of the same moment on all ranks.

A file holds a checksum of its contents. A state that an earlier run left and that is damaged is dropped, and with it
those that were saved after it, which may rest on it: the run resumes from the states before.

A state and the one that it replaces lie on the disk together while the new one is written. Where the disk has no room
for both, the older one goes first: then a kill before the new one is complete costs the phase's work, and no result.
"""

import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dualsft.errors import UserError, first_line
from dualsft.models.tensor_file import OpenTensors
from dualsft.runs.progress import Meter, say
from dualsft.sharding.collectives import all_gather, all_reduce_max, any_rank, on_all_ranks, rank, world_size
from dualsft.storage.writing import refusal, replacing

_NOTES, _CHECKSUM = "notes", "crc32"
_SPARE = 2**26
"""Bytes that are left free on a disk, for what else is written there meanwhile."""
_PARTIAL = ("*.partial", ".tmp*")
"""Patterns of the files that become states: those of `replacing`, and those of safetensors before them."""


class PhaseStore:
    """Saves and loads the states of phases in a folder that the ranks share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sound: set[Path] = set()  # written or checked by this process

    def save(
        self, phase: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any], replaces: Collection[str] = ()
    ) -> None:
        """Save a phase's state; the states that it replaces stay until it is complete, if the disk has room for both.

        Args:
            phase: The phase's name; an earlier state of it is replaced.
            tensors: Named tensors, of a sharded model this rank's shards.
            notes: What JSON can hold.
            replaces: Names of other phases whose states this one makes superfluous.

        Raises:
            UserError: on every rank, if one cannot write.
        """
        # 1. The new state gets a number that no rank has used.
        before = self._versions(phase)
        path = self._file(phase, all_reduce_max(max(before, default=0)) + 1 if world_size() > 1 else 0)
        held = on_all_ranks(lambda: {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})
        older = [self._file(phase, version) for version in before]
        older += [self._file(other, version) for other in replaces for version in self._versions(other)]
        # 2. Where the disk has no room for both, the older ones go first.
        self.make_room(sum(tensor.nbytes for tensor in held.values()), [phase, *replaces])
        # 3. Every rank writes its part, and all raise if one fails: then the state before is the latest complete one.
        on_all_ranks(lambda: self._write(path, held, notes))
        # 4. Only a complete state makes the earlier ones superfluous; a single process has overwritten its file.
        _remove(file for file in older if file != path)

    def make_room(self, size: int, phases: Collection[str]) -> bool:
        """Drop the states of phases if the disk has no room for what all ranks will write, ``size`` bytes this one.

        Returns:
            Whether it has room now.
        """
        if self._has_room(size):
            return True
        for phase in phases:
            self.drop(phase)
        return self._has_room(size)

    def _has_room(self, size: int) -> bool:
        try:
            free = shutil.disk_usage(self._folder).free
        except OSError:  # writing will tell
            free = sys.maxsize
        return not any_rank(free < sum(all_gather(size)) + _SPARE)

    def drop_partial(self) -> None:
        """Delete what a kill has left of files in the middle of being written, whichever rank's."""
        _remove(path for pattern in _PARTIAL for path in self._folder.glob(pattern))

    def _write(self, path: Path, contiguous: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        text = json.dumps(notes)
        try:
            with replacing(path) as partial:
                save_file(dict(contiguous), partial, {_NOTES: text, _CHECKSUM: _checksum(contiguous, text)})
        except Exception as error:
            if (reason := refusal(error)) is None:
                raise
            raise UserError(
                f"The state of the run cannot be kept in {self._folder} ({reason}); see that it can be written and has "
                "room, and go on with --resume."
            ) from error
        self._sound.add(path)

    def load(self, phase: str) -> tuple[Mapping[str, Tensor], dict[str, Any]] | None:
        """The tensors and notes of a phase's state, or None; a tensor is read from its file at every use, and not kept.

        The tensors stay those of this state, even when it is dropped or another is saved.
        """
        found = all_gather({version: self._damage(self._file(phase, version)) for version in self._versions(phase)})
        common = set.intersection(*map(set, found))  # a kill may leave a newer state on some ranks only
        damaged = {version for version in common if any(of_rank[version] for of_rank in found)}
        if damaged:
            reason = next(of_rank[v] for of_rank in found for v in damaged if of_rank[v])
            say(f"{reason}: this state and those saved after it are dropped, and computed again.")
            self._drop_since(self._file(phase, min(damaged)))
        if not (whole := common - damaged):
            return None
        stored = OpenTensors(self._file(phase, max(whole)))
        # on Windows an open file can be neither replaced nor deleted
        tensors: Mapping[str, Tensor] = dict(stored) if os.name == "nt" else stored
        return tensors, json.loads(stored.metadata[_NOTES])

    def _damage(self, path: Path) -> str | None:
        """What is wrong with a file, in a sentence; None if it is as it was written."""
        if path in self._sound:
            return None
        try:
            stored = OpenTensors(path)
            text = stored.metadata[_NOTES]
            if not isinstance(json.loads(text), dict):
                return f"{path} is damaged (it has no notes)"
        except Exception as error:  # damaged bytes may raise anything
            return f"{path} is damaged ({first_line(error)})"
        checksum = stored.metadata.get(_CHECKSUM)
        if checksum not in (None, _checksum(stored, text)):  # None: an earlier version's
            return f"{path} is damaged (it holds other bytes than were written)"
        self._sound.add(path)
        return None

    def _drop_since(self, path: Path) -> None:
        """Delete a file of this rank, and those of its files that were written later."""
        moment = path.stat().st_mtime_ns
        own = self._folder.glob(f"*{_suffix('*')}.safetensors")
        _remove([found for found in own if found.stat().st_mtime_ns >= moment])

    def drop(self, phase: str) -> None:
        """Delete a phase's state, if there is any."""
        _remove(self._file(phase, version) for version in self._versions(phase))

    def drop_all(self, but: Collection[str]) -> None:
        """Delete the states of all phases but these: of phases under way too, and of those that a kill left over."""
        own = f"*{_suffix('*')}.safetensors"
        kept = {self._file(phase, version) for phase in but for version in self._versions(phase)}
        _remove(path for path in self._folder.glob(own) if path not in kept)

    def _versions(self, phase: str) -> list[int]:
        """The numbers of the states of a phase that this rank has saved; a single process has number 0 at most."""
        if world_size() == 1:
            return [0] if self._file(phase, 0).is_file() else []
        found = self._folder.glob(f"{phase}{_suffix('*')}.safetensors")
        return [int(path.name.removeprefix(f"{phase}@").split(".")[0]) for path in found]

    def _file(self, phase: str, version: int) -> Path:
        return self._folder / f"{phase}{_suffix(version)}.safetensors"


def _suffix(version: int | str) -> str:
    """What this rank's files have after the name of the phase."""
    return f"@{version}.rank-{rank()}-of-{world_size()}" if world_size() > 1 else ""


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """CRC-32 over notes and tensors: for damage on a disk, at a few gigabytes a second."""
    sum_so_far = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sum_so_far = zlib.crc32(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode(), sum_so_far)
        if tensor.numel():
            sum_so_far = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, sum_so_far)
    return f"{sum_so_far:08x}"


class PhaseKeeper:
    """Saves the state of a phase in progress at intervals of minutes; implements `dualsft.matrix.passes.Keeper`.

    Attributes:
        name: The name of the state.
        earlier: The phase's cost before its present start, in a killed run or a discarded attempt; {} for a new one.
        meter: Measures the phase's cost, from its start.
    """

    def __init__(self, store: PhaseStore, phase: str, minutes: float) -> None:
        self._store, self.name, self._seconds = store, f"{phase}.under-way", 60 * minutes
        self._loaded = store.load(self.name)
        self._last_save = time.monotonic()
        self.earlier: dict[str, Any] = self._loaded[1] if self._loaded else {}
        self.meter: Meter | None = None

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
            self._store.save(self.name, tensors, {**notes, **self.meter.so_far()})
        else:
            say(f"the disk has no room for the state of the {self.name}: after a kill this phase would start again.")
        self._last_save = time.monotonic()

    def begin_again(self) -> None:
        """Discard the saved state, but keep the time spent on it."""
        assert self.meter is not None
        self.earlier = {**self.meter.so_far(), "examples": 0, "tokens": 0}
        self.drop()

    def drop(self) -> None:
        """Discard the saved state."""
        self._loaded = None
        self._store.drop(self.name)
