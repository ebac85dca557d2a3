"""The state of a run's phases, in files: each state is saved completely or not at all, by one process or by all ranks.

Ranks that hold shards save each its own part in a file. A state counts once all ranks have saved theirs. Until then the
state before it stays, so that the states that a killed run leaves are of the same moment on all ranks.

Replicas have the same state once a phase is finished: the first of them saves it, as if it were the only one, and all
read it. In a pass each replica has a state of its own, which it saves and loads without the others.

A job may go on with another number of ranks: then each takes its rows from the files of the ranks before
(`joined_state.py`), until the states that they have saved are replaced or dropped.

A file holds a checksum of its contents. A state that an earlier run left and that is damaged is dropped, and with it
those that were saved after it, which may rest on it: the run resumes from the states before.

A state and the one that it replaces lie on the disk together while the new one is written. Where the disk has no room
for both, the older one goes first: then a kill before the new one is complete costs the phase's work, and no result.
"""

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from dualsft.models.tensor_file import OpenTensors
from dualsft.runs.joined_state import JoinedState, latest_of_others
from dualsft.runs.progress import say
from dualsft.runs.state_file import StateName, damage_of, notes_of, state_files, write_state
from dualsft.runs.state_layout import StateLayout
from dualsft.sharding.collectives import all_gather, all_reduce_max, any_rank, on_all_ranks, on_rank_zero
from dualsft.sharding.groups import RankGroup, job_group, own_group, rank, shard_group, world_size

T = TypeVar("T")
State = tuple[Mapping[str, Tensor], dict[str, Any]]
"""Tensors and notes."""

_SPARE = 2**26
"""Bytes that are left free on a disk, for what else is written there meanwhile."""
_PARTIAL = ("*.partial", ".tmp*")
"""Patterns of the files that become states: those of `replacing`, and those of safetensors before them."""


class PhaseStore:
    """Saves and loads the states of phases in a folder that the ranks share.

    Args:
        folder: The folder.
        group_of: Gives the ranks whose states they are, which others know nothing of: all, those of a replica, or one.
    """

    def __init__(self, folder: Path, group_of: Callable[[], RankGroup] = job_group) -> None:
        self._folder, self._group_of = folder, group_of
        self._sound: set[Path] = set()  # written or checked by this process

    @property
    def group(self) -> RankGroup:
        """The ranks whose states they are."""
        return self._group_of()

    def own(self) -> "PhaseStore":
        """Where this rank keeps, by itself, what other ranks know nothing of."""
        return PhaseStore(self._folder, own_group)

    def of_replica(self) -> "PhaseStore":
        """Where the ranks of a replica keep what other replicas know nothing of."""
        return PhaseStore(self._folder, shard_group)

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
        if self._layout.in_parts:
            self._save_part(phase, tensors, notes, replaces)
        else:
            self._on_first(lambda: self._save_whole(phase, tensors, notes, replaces))

    @property
    def _layout(self) -> StateLayout:
        return StateLayout(self.group)

    def _on_first(self, action: Callable[[], T]) -> T:
        """What an action gives that is run once for all of the group: one rank, or all."""
        assert len(self.group) == 1 or not self._layout.of_some
        return action() if len(self.group) == 1 else on_rank_zero(action)

    def _save_part(
        self, phase: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any], replaces: Collection[str]
    ) -> None:
        # 1. The new state gets a number that no rank has used.
        before = self._versions(phase)
        path = self._file(phase, all_reduce_max(max(before, default=0), self.group) + 1)
        held = on_all_ranks(lambda: _on_host(tensors) if self._layout.writes else {}, self.group)
        older = self._files([phase, *replaces])
        # 2. Where the disk has no room for both, the older ones go first.
        self.make_room(_size(held), [phase, *replaces])
        # 3. Every rank writes its part, and all raise if one fails: then the state before is the latest complete one.
        on_all_ranks(lambda: self._write(path, held, notes) if self._layout.writes else None, self.group)
        # 4. Only a complete state makes the earlier ones superfluous.
        _remove(older)

    def _save_whole(
        self, phase: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any], replaces: Collection[str]
    ) -> None:
        """Save a state that no other rank has a part of, in the place of an earlier one."""
        held, path = _on_host(tensors), self._file(phase)
        older = self._files([phase, *replaces])
        if not self._has_room_here(_size(held)):
            _remove(older)
        self._write(path, held, notes)
        _remove([file for file in older if file != path])

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
        """Whether the disk has room for what this rank is to write, and others like it at the same time."""
        size *= world_size() // len(self.group)  # of each replica by itself
        if self._layout.in_parts:
            total = sum(all_gather(size if self._layout.writes else 0, self.group))
            return not any_rank(not self._has_room_here(total), self.group)
        return self._on_first(lambda: self._has_room_here(size))

    def _has_room_here(self, size: int) -> bool:
        try:
            return shutil.disk_usage(self._folder).free >= size + _SPARE
        except OSError:  # writing will tell
            return True

    def drop_partial(self) -> None:
        """Delete what a kill has left of files in the middle of being written, whichever rank's."""
        _remove(path for pattern in _PARTIAL for path in self._folder.glob(pattern))

    def _write(self, path: Path, contiguous: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        write_state(path, contiguous, notes)
        self._sound.add(path)

    def load(self, phase: str) -> State | None:
        """The tensors and notes of a phase's state, or None; a tensor is read from its file at every use, and not kept.

        The tensors stay those of this state, even when it is dropped or another is saved. What another number of ranks
        has saved is found too, and of shards each rank is given its rows.
        """
        own = self._own(phase)
        files = [] if self._layout.of_some else self._latest_of_others(phase, own)
        place = (self._layout.rank, len(shard_group())) if self._layout.in_parts else (0, 1)
        return self._opened(lambda: JoinedState(files, *place) if files else _open(own))

    def load_own(self, phase: str) -> State | None:
        """The same, if as many ranks have saved it in the same way."""
        own = self._own(phase)
        return self._opened(lambda: _open(own))

    def _own(self, phase: str) -> Path | None:
        """This rank's file of the phase's latest state; of replicas, common to all."""
        if self._layout.in_parts:
            return self._whole_part(phase)
        return self._on_first(lambda: self._whole(phase))

    def _latest_of_others(self, phase: str, own: Path | None) -> list[Path]:
        """The files of the latest state, if another number of ranks has saved it."""
        moment = max(all_gather(0 if own is None else own.stat().st_mtime_ns))
        layout = len(shard_group())

        while files := on_rank_zero(lambda: latest_of_others(self._folder, phase, layout, moment)):
            own_share = files[rank() :: world_size()]
            reasons = [reason for of in all_gather([*map(self._damage, own_share)]) for reason in of if reason]
            if not reasons:
                break
            oldest = min(files, key=lambda path: path.stat().st_mtime_ns)
            on_rank_zero(partial(self._drop_damaged, oldest, reasons[0]))
        return files

    def _opened(self, find: Callable[[], OpenTensors | JoinedState | None]) -> State | None:
        """What is kept in a state; of a common one, opened by all before rank zero, which is ahead, drops it."""
        stored = on_all_ranks(find, self.group)
        if stored is None:
            return None
        # on Windows an open file can be neither replaced nor deleted
        tensors: Mapping[str, Tensor] = dict(stored) if os.name == "nt" else stored
        return tensors, notes_of(stored.metadata)

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
        """The file of this rank's part of a phase's latest state that is whole on all ranks.

        Those look that write; other replicas read what these have found.
        """
        own = None
        if self._layout.writes:
            own = {version: self._damage(self._file(phase, version)) for version in self._versions(phase)}
        found = [of_rank for of_rank in all_gather(own, self.group) if of_rank is not None]
        common = set.intersection(*map(set, found))  # a kill may leave a newer state on some ranks only
        damaged = {version for version in common if any(of_rank[version] for of_rank in found)}
        if damaged:
            first = min(damaged)
            reason = next(told for of_rank in found if (told := of_rank[first]))
            if self._layout.writes:
                self._drop_damaged(self._file(phase, first), reason)
            common = {version for version in common if version < first}  # the later ones are dropped too
        return self._file(phase, max(common)) if common else None

    def _drop_damaged(self, path: Path, reason: str) -> None:
        if self.group.rank == 0:
            told = f"{reason}: this state and those saved after it are dropped, and computed again."
            say(told, of_rank=self._layout.of_some)
        self._drop_since(path)

    def _damage(self, path: Path) -> str | None:
        """What is wrong with a file, in a sentence; None if it is as it was written."""
        if path in self._sound:
            return None
        if (reason := damage_of(path)) is None:
            self._sound.add(path)
        return reason

    def _drop_since(self, path: Path) -> None:
        """Delete a file, and those that were written later, as far as it is for this rank to delete them."""
        moment = path.stat().st_mtime_ns
        _remove([found for found, _ in self._deletable() if found.stat().st_mtime_ns >= moment])

    def drop(self, phase: str) -> None:
        """Delete a phase's state, if there is any."""
        _remove(self._files([phase]))

    def drop_all(self, but: Collection[str]) -> None:
        """Delete the states of all phases but these: of phases under way too, and of those that a kill left over."""
        _remove([path for path, name in self._deletable() if name.phase not in but])

    def _files(self, phases: Collection[str]) -> list[Path]:
        """The files of phases that it is for this rank to delete."""
        return [path for path, name in self._deletable() if name.phase in phases]

    def _deletable(self) -> Iterator[tuple[Path, StateName]]:
        """The files of states that it is for this rank to delete."""
        layout = self._layout
        return ((path, name) for path, name in state_files(self._folder) if layout.deletes(name))

    def _versions(self, phase: str) -> list[int]:
        """The numbers of the states of a phase of which there is this rank's part."""
        names = [name for _, name in state_files(self._folder) if name.phase == phase and self._layout.has(name)]
        return [name.version for name in names if name.rank == self._layout.rank and name.version is not None]

    def _file(self, phase: str, version: int | None = None) -> Path:
        return self._folder / str(self._layout.name(phase, version))


def _open(path: Path | None) -> OpenTensors | None:
    return None if path is None else OpenTensors(path)


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
