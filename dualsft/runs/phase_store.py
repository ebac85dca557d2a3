"""The state of a run's phases, in files: each state is saved completely or not at all, by one process or by all ranks.

Ranks that hold shards save each its own part in a file. A state counts once all ranks have saved theirs. Until then the
state before it stays, so that the states that a killed run leaves are of the same moment on all ranks.

Replicas have the same state once a phase is finished: rank zero saves it, as a single process does, and all read it. In
a pass each replica has a state of its own, which it saves and loads without the others.

A file holds a checksum of its contents. A state that an earlier run left and that is damaged is dropped, and with it
those that were saved after it, which may rest on it: the run resumes from the states before.

A state and the one that it replaces lie on the disk together while the new one is written. Where the disk has no room
for both, the older one goes first: then a kill before the new one is complete costs the phase's work, and no result.
"""

import json
import os
import re
import shutil
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
from dualsft.sharding.collectives import (
    all_gather,
    all_reduce_max,
    any_rank,
    has_replicas,
    on_all_ranks,
    on_rank_zero,
    rank,
    world_size,
)
from dualsft.storage.writing import refusal, replacing

_NOTES, _CHECKSUM = "notes", "crc32"
_SPARE = 2**26
"""Bytes that are left free on a disk, for what else is written there meanwhile."""
_PARTIAL = ("*.partial", ".tmp*")
"""Patterns of the files that become states: those of `replacing`, and those of safetensors before them."""


class PhaseStore:
    """Saves and loads the states of phases in a folder that the ranks share.

    Args:
        folder: The folder.
        of_rank: Whether the states are this rank's alone, which other ranks know nothing of.
    """

    def __init__(self, folder: Path, of_rank: bool = False) -> None:
        self._folder, self._of_rank = folder, of_rank
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
        if self._in_parts:
            self._save_part(phase, tensors, notes, replaces)
        elif self._of_rank:
            self._save_whole(phase, tensors, notes, replaces)
        else:
            on_rank_zero(lambda: self._save_whole(phase, tensors, notes, replaces))

    @property
    def _in_parts(self) -> bool:
        """Whether each rank saves a part of every state."""
        return world_size() > 1 and not has_replicas()

    def _save_part(
        self, phase: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any], replaces: Collection[str]
    ) -> None:
        # 1. The new state gets a number that no rank has used.
        before = self._versions(phase)
        path = self._file(phase, all_reduce_max(max(before, default=0)) + 1)
        held = on_all_ranks(lambda: _on_host(tensors))
        older = [self._file(phase, version) for version in before]
        older += [self._file(other, version) for other in replaces for version in self._versions(other)]
        # 2. Where the disk has no room for both, the older ones go first.
        self.make_room(_size(held), [phase, *replaces])
        # 3. Every rank writes its part, and all raise if one fails: then the state before is the latest complete one.
        on_all_ranks(lambda: self._write(path, held, notes))
        # 4. Only a complete state makes the earlier ones superfluous.
        _remove(older)

    def _save_whole(
        self, phase: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any], replaces: Collection[str]
    ) -> None:
        """Save a state that no other rank has a part of, in the place of an earlier one."""
        held, path = _on_host(tensors), self._file(phase)
        older = [file for other in replaces for file in self._common_files(other)]
        if not self._has_room_here(_size(held)):
            _remove([path, *older])
        self._write(path, held, notes)
        _remove(older)

    def make_room(self, size: int, phases: Collection[str]) -> bool:
        """Drop the states of phases if the disk has no room for what is to be written.

        Args:
            size: The bytes that this rank will write; of replicas' common states, all.
            phases: The phases' names.

        Returns:
            Whether it has room now.
        """
        if self._has_room(size):
            return True
        for phase in phases:
            self.drop(phase)
        return self._has_room(size)

    def _has_room(self, size: int) -> bool:
        if self._in_parts:
            total = sum(all_gather(size))
            return not any_rank(not self._has_room_here(total))
        return self._has_room_here(size) if self._of_rank else on_rank_zero(lambda: self._has_room_here(size))

    def _has_room_here(self, size: int) -> bool:
        try:
            return shutil.disk_usage(self._folder).free >= size + _SPARE
        except OSError:  # writing will tell
            return True

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
        if self._in_parts:
            stored = self._opened(self._whole_part(phase))
        elif self._of_rank:
            stored = self._opened(self._whole(phase))
        else:
            path = on_rank_zero(lambda: self._whole(phase))
            stored = on_all_ranks(lambda: self._opened(path))  # before rank zero, which is ahead, drops it
        if stored is None:
            return None
        # on Windows an open file can be neither replaced nor deleted
        tensors: Mapping[str, Tensor] = dict(stored) if os.name == "nt" else stored
        return tensors, json.loads(stored.metadata[_NOTES])

    def _opened(self, path: Path | None) -> OpenTensors | None:
        return None if path is None else OpenTensors(path)

    def _whole(self, phase: str) -> Path | None:
        """The file of a phase's state, if there is one and it is not damaged."""
        path = self._file(phase)
        if not path.is_file():
            return None
        if (reason := self._damage(path)) is None:
            return path
        self._drop_damaged(path, reason)
        return None

    def _whole_part(self, phase: str) -> Path | None:
        """The file of this rank's part of a phase's latest state that is whole on all ranks."""
        found = all_gather({version: self._damage(self._file(phase, version)) for version in self._versions(phase)})
        common = set.intersection(*map(set, found))  # a kill may leave a newer state on some ranks only
        damaged = {version for version in common if any(of_rank[version] for of_rank in found)}
        if damaged:
            reason = next(told for of_rank in found for v in damaged if (told := of_rank[v]))
            self._drop_damaged(self._file(phase, min(damaged)), reason)
        whole = common - damaged
        return self._file(phase, max(whole)) if whole else None

    def _drop_damaged(self, path: Path, reason: str) -> None:
        say(f"{reason}: this state and those saved after it are dropped, and computed again.", of_rank=self._of_rank)
        self._drop_since(path)

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
        """Delete a file of this rank, or of all replicas, and those of its files that were written later."""
        moment = path.stat().st_mtime_ns
        own = f"*{self._suffix}.safetensors"
        _remove([found for found in self._folder.glob(own) if found.stat().st_mtime_ns >= moment])

    def drop(self, phase: str) -> None:
        """Delete a phase's state, if there is any."""
        if self._in_parts:
            _remove(self._file(phase, version) for version in self._versions(phase))
        elif self._of_rank:
            _remove([self._file(phase)])
        elif rank() == 0:
            _remove(self._common_files(phase))

    def drop_all(self, but: Collection[str]) -> None:
        """Delete the states of all phases but these: of phases under way too, and of those that a kill left over.

        Rank zero of replicas deletes those of all.
        """
        if self._in_parts or self._of_rank or rank() == 0:
            own = self._folder.glob(f"*{self._suffix}.safetensors")
            _remove([path for path in own if _phase_of(path) not in but])

    def _common_files(self, phase: str) -> list[Path]:
        """The file of a phase's state, and those that replicas have left of it, each for itself."""
        of_ranks = [] if self._of_rank else self._folder.glob(f"{phase}.rank-*-of-*.safetensors")
        return [self._file(phase), *of_ranks]

    def _versions(self, phase: str) -> list[int]:
        """The numbers of the states of a phase of which this rank has saved its part."""
        found = self._folder.glob(f"{phase}@*{self._suffix}.safetensors")
        return [int(path.name.removeprefix(f"{phase}@").split(".")[0]) for path in found]

    @property
    def _suffix(self) -> str:
        """What the names of this rank's files end with."""
        return f".rank-{rank()}-of-{world_size()}" if self._of_rank or self._in_parts else ""

    def _file(self, phase: str, version: int | None = None) -> Path:
        number = "" if version is None else f"@{version}"
        return self._folder / f"{phase}{number}{self._suffix}.safetensors"


def _phase_of(path: Path) -> str:
    """The phase whose state a file holds, or this rank's part of it."""
    return re.sub(r"(@\d+)?(\.rank-\d+-of-\d+)?\.safetensors$", "", path.name)


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


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
