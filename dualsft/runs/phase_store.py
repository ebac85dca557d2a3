"""The state of a run's phases, in files: each phase's is kept whole or not at all, by one process or by all ranks.

Ranks keep a file each, of what is theirs. A state counts once all have kept it: until then the one before it stays, so
that a run killed at any moment finds states of one and the same moment on all ranks.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dualsft.errors import UserError
from dualsft.sharding.collectives import all_gather, all_reduce_max, barrier, rank, world_size


class PhaseStore:
    """Keeps states in a folder.

    Args:
        folder: The folder, which the ranks share.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, phase: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Keep a phase's state, whole or not at all: until it is whole, what was kept before stays.

        Raises:
            UserError: if it cannot be written.
        """
        before = self._moments(phase)
        path = self._file(phase, all_reduce_max(max(before, default=0)) + 1 if world_size() > 1 else 0)
        partial = path.with_suffix(".partial")
        try:
            whole = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
            save_file(whole, partial, {"notes": json.dumps(notes)})
            with open(partial, "rb") as stream:
                os.fsync(stream.fileno())
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise UserError(
                f"The state of the run cannot be kept in {self._folder} ({error}); see that it can be written and has "
                "room, and go on with --resume."
            ) from error
        if world_size() > 1:
            barrier()  # all have it; only now may the one before it go
            for moment in before:
                self._file(phase, moment).unlink(missing_ok=True)

    def load(self, phase: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and notes that were kept of a phase, or None; a tensor is read when it is first used."""
        common = set.intersection(*map(set, all_gather(self._moments(phase))))
        if not common:
            return None
        with safe_open(self._file(phase, max(common)), framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            return tensors, json.loads(stored.metadata()["notes"])

    def drop(self, phase: str) -> None:
        """Forget a phase's state, if there is any."""
        for moment in self._moments(phase):
            self._file(phase, moment).unlink(missing_ok=True)

    def _moments(self, phase: str) -> list[int]:
        """Which states of a phase this rank has, by when they were kept; a single process has one at most."""
        if world_size() == 1:
            return [0] if self._file(phase, 0).is_file() else []
        found = self._folder.glob(f"{phase}@*.rank-{rank()}-of-{world_size()}.safetensors")
        return [int(path.name.removeprefix(f"{phase}@").split(".")[0]) for path in found]

    def _file(self, phase: str, moment: int) -> Path:
        place = f"@{moment}.rank-{rank()}-of-{world_size()}" if world_size() > 1 else ""
        return self._folder / f"{phase}{place}.safetensors"
