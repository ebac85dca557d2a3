"""States that another number of ranks has saved: each rank takes its rows from the files of all of them.

What begins with one of `SHARDED` and a colon has the rows of a parameter's tensor, of which each of N ranks has as many
as FSDP2 gives it; all else is the same on every rank.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dualsft.models.lazy import LazyTensors
from dualsft.models.tensor_file import OpenTensors
from dualsft.runs.state_file import state_files
from dualsft.sharding.shards import rows_of_rank

SHARDED = ("sum", "column", "weight", "moment")
"""What the names of tensors that are sharded begin with."""


def latest_of_others(folder: Path, phase: str, ranks: int, since: int) -> list[Path]:
    """The files of a phase's latest complete state that another number of ranks than this one has saved.

    Args:
        folder: Where the states are.
        phase: The phase.
        ranks: How many ranks save a part each; 1 where states are common to all.
        since: Nanoseconds; an earlier state does not count.
    """
    states: dict[tuple[int, int], dict[int, Path]] = defaultdict(dict)
    for path, name in state_files(folder):
        of_some = name.replica is not None or (name.version is None) != (name.rank is None)  # and not of all ranks
        if name.phase == phase and not of_some:
            states[name.ranks or 1, name.version or 0][name.rank or 0] = path
    complete = [of for (count, _), of in states.items() if len(of) == count != ranks]
    in_order = [[of[k] for k in range(len(of))] for of in complete]
    latest = max(in_order, key=_moment, default=[])
    return latest if latest and _moment(latest) > since else []


def _moment(files: Sequence[Path]) -> int:
    """When the last of a state's files was written, in nanoseconds."""
    return max(path.stat().st_mtime_ns for path in files)


class JoinedState(LazyTensors):
    """A rank's tensors of a state whose parts lie in several files; each is read at every use.

    Args:
        files: The files of the ranks that have saved it, in their order.
        rank: The rank that is to have its rows.
        ranks: Among so many; 1 for all rows.

    Attributes:
        metadata: The strings of the first file.
    """

    def __init__(self, files: Sequence[Path], rank: int, ranks: int) -> None:
        self._parts, self._place = [OpenTensors(path) for path in files], (rank, ranks)
        self.metadata = self._parts[0].metadata
        super().__init__(self._parts[0], self._join)

    def _join(self, name: str) -> Tensor:
        if name.split(":")[0] not in SHARDED:
            return self._parts[0][name]
        sizes = [part.specs[name].shape[0] for part in self._parts]
        own = rows_of_rank(sum(sizes), *self._place)
        rows, first = [], 0
        for part, size in zip(self._parts, sizes, strict=True):
            start, end = max(own.start, first) - first, min(own.stop, first + size) - first
            if start < end:
                rows.append(part.rows(name, start, end))
            first += size
        return torch.cat(rows) if rows else self._parts[0].rows(name, 0, 0)
