"""Batches of ids -> examples, and a loader that can resume in the middle of an epoch."""

from collections.abc import Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, cast

from torch.utils.data import DataLoader, Dataset

from dualsft.data.batches import BatchIds, TrainingBatches
from dualsft.data.dealing import Deal, dealt
from dualsft.data.packing import Row
from dualsft.errors import UserError

if TYPE_CHECKING:
    import datasets


class RowLists(Dataset[list[Any]]):
    """Gives the examples of a batch for their ids.

    With ``batch_size=None`` a loader fetches each item of its sampler as a batch. The ids come from a sampler, not from
    a batch sampler, because Lightning calls ``set_epoch`` on the former.
    """

    def __init__(self, examples: "datasets.Dataset") -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, ids: list[Any]) -> list[Any]:
        return self._examples.__getitems__(ids)


class PackedRowLists(RowLists):
    """Gives a list of examples for each packed row of a batch; the examples of all rows are read at once."""

    def __getitem__(self, ids: list[Row]) -> list[Any]:
        examples = iter(super().__getitem__(list(chain.from_iterable(ids))))
        return [list(islice(examples, len(row))) for row in ids]


class ScoringLoader(DataLoader[Any]):
    """A loader of batches for scoring that knows how many tokens they have.

    Attributes:
        skipped_tokens: Tokens of the batches that come before its own, in a pass that goes on where it was killed.
        all_tokens: These and the tokens of its own batches.
    """

    skipped_tokens = 0
    all_tokens = 0


class ResumableLoader(DataLoader[Any]):
    """A loader over `TrainingBatches` that continues after a checkpoint in mid-epoch with the remaining batches.

    Lightning saves and restores the state of a loader that has ``state_dict`` and ``load_state_dict``. It restores
    before it tells the sampler the epoch, hence the iterator decides where to start only when its first batch is
    asked for.

    Attributes:
        deal: Which rows of each batch are this process's, where several share it; None for all.
    """

    deal: Deal | None = None
    _epoch = 0
    _yielded = 0
    _restored = False

    def state_dict(self) -> dict[str, int]:
        """The epoch, how many of its batches have been handed out, and how many it has."""
        return {"epoch": self._epoch, "yielded": self._yielded, "batches": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next pass over the same epoch start behind the batches already handed out.

        Raises:
            UserError: If the state belongs to other batches.
        """
        if state["batches"] != len(self):
            raise UserError(
                f"The checkpoint was made with {state['batches']} batches per epoch but the data now give {len(self)}: "
                "resume with the data and the data options of the interrupted run."
            )
        self._epoch, self._yielded, self._restored = state["epoch"], state["yielded"], True

    def batch(self, ids: BatchIds) -> Any:
        """The whole batch of these ids, whichever the loader would give next."""
        return self.collate_fn(cast(RowLists, self.dataset)[ids])

    def own_part(self, ids: BatchIds) -> Any:
        """The same, or this process's rows of it where batches are dealt."""
        options = self._options()
        return options["collate_fn"](options["dataset"][ids])

    def _options(self) -> dict[str, Any]:
        """The arguments of a loader of whole batches, or of this process's rows."""
        return dealt({"dataset": self.dataset, "collate_fn": self.collate_fn}, self.deal)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        epoch = cast(TrainingBatches, self.sampler).epoch
        batches = cast(TrainingBatches, self.sampler).in_epoch(epoch)
        if not (self._restored and epoch == self._epoch and self._yielded < len(batches)):
            self._yielded = 0  # a new epoch, or the restored one was finished
        self._epoch, self._restored = epoch, False
        remaining: DataLoader[Any] = DataLoader(  # a plain loader: the batches already seen are not even read
            batch_size=None,
            sampler=batches[self._yielded :],
            **self._options(),
            num_workers=self.num_workers,
            worker_init_fn=self.worker_init_fn,
        )
        for batch in remaining:
            self._yielded += 1
            yield batch
