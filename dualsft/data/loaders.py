"""Batches of ids -> a loader, and one that a checkpoint in the middle of an epoch can bring back."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset

from dualsft.data.batches import BatchIds, TrainingBatches, collate
from dualsft.data.layout import Batch
from dualsft.data.packed_batches import Row
from dualsft.data.packing import collate_packed
from dualsft.errors import UserError

if TYPE_CHECKING:
    import datasets

Example = dict[str, Any]


class RowLists(Dataset[list[Example]]):
    """Gives several rows for a list of ids, so that a sampler can name whole batches.

    With ``batch_size=None`` a loader asks for what the sampler yields; a sampler, unlike a batch sampler, is where
    Lightning looks for ``set_epoch``.
    """

    def __init__(self, examples: "datasets.Dataset") -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, ids: list[int]) -> list[Example]:
        columns = self._examples[ids]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


class PackedRowLists(Dataset[list[list[Example]]]):
    """Gives a list of examples for each packed row of a batch; the examples of all rows are read at once."""

    def __init__(self, examples: "datasets.Dataset") -> None:
        self._examples = RowLists(examples)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, rows: list[Row]) -> list[list[Example]]:
        examples = iter(self._examples[[example_id for row in rows for example_id in row]])
        return [list(islice(examples, len(row))) for row in rows]


class ResumableLoader(DataLoader[Any]):
    """A loader over `TrainingBatches` that goes on, after a checkpoint in mid-epoch, with the batches not yet seen.

    Lightning saves and restores the state of a loader that has ``state_dict`` and ``load_state_dict``. It restores
    before it tells the sampler the epoch, hence the iterator decides where to start only when its first batch is
    asked for.
    """

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

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = list(self.sampler)
        for batch in self._over(batches[self._start(len(batches)) :]):
            self._yielded += 1
            yield batch

    def _start(self, count: int) -> int:
        epoch = cast(TrainingBatches, self.sampler).epoch
        goes_on = self._restored and epoch == self._epoch and self._yielded < count
        self._restored = False
        self._epoch, self._yielded = epoch, self._yielded if goes_on else 0
        return self._yielded

    def _over(self, batches: list[Any]) -> DataLoader[Any]:
        """A plain loader over the remaining batches: those already seen are not even read."""
        return DataLoader(
            self.dataset,
            batch_size=None,
            sampler=batches,
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
            worker_init_fn=self.worker_init_fn,
        )


class KeepEpochCount(Callback):
    """Keeps checkpoints resumable in a run that was itself resumed from the last batch of an epoch.

    Lightning then starts the next epoch without counting it as begun, and takes every later checkpoint of that run for
    one between two epochs: the loader's position would be ignored. Within an epoch, one more has begun than has ended.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restores the count before the batch that a checkpoint may follow."""
        epochs = trainer.fit_loop.epoch_progress
        trackers: tuple[Any, ...] = (epochs.total, epochs.current)
        for tracker in trackers:
            tracker.ready = tracker.started = tracker.processed + 1


def training_loader(
    examples: "datasets.Dataset", batches: TrainingBatches, pad_token_id: int, num_workers: int, packed: bool = False
) -> ResumableLoader:
    """A loader for training over a dataset whose row numbers are the ids in ``batches``."""
    return ResumableLoader(sampler=batches, **_options(examples, pad_token_id, num_workers, packed))


def scoring_loader(
    examples: "datasets.Dataset",
    batches: Iterable[BatchIds],
    pad_token_id: int,
    num_workers: int,
    packed: bool = False,
) -> DataLoader[Batch]:
    """A loader that goes through the batches as they stand."""
    return DataLoader(sampler=batches, **_options(examples, pad_token_id, num_workers, packed))


def _options(examples: "datasets.Dataset", pad_token_id: int, num_workers: int, packed: bool) -> dict[str, Any]:
    return {
        "dataset": PackedRowLists(examples) if packed else RowLists(examples),
        "batch_size": None,
        "collate_fn": partial(collate_packed if packed else collate, pad_token_id=pad_token_id),
        "num_workers": num_workers,
    }
