from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from dualsft.data.dealing import extent_of
from dualsft.data.layout import Batch
from dualsft.data.loaders import ResumableLoader, RowLists
from dualsft.data.module import InstructionDataModule
from dualsft.errors import UserError
from dualsft.finetune.checkpointing import KeepEpochCount
from tests.world.data import write_jsonl
from tests.world.tokenizers import byte_level

pytestmark = [
    # Lightning's own use of torch's tree utilities, with torch 2.13
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    # a resumed run writes where the interrupted one did
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class InterruptedRunError(Exception):
    """Stands for a killed run."""


class Watcher(pl.LightningModule):
    """A one-weight model that writes down which examples each step saw, and dies where told."""

    def __init__(self, die_after: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.steps: list[tuple[int, list[int]]] = []
        self.epochs: list[int] = []
        self.validated = 0
        self.die_after = die_after

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        if self.die_after == len(self.steps):
            raise InterruptedRunError
        self.steps.append((self.current_epoch, batch["example_id"].tolist()))
        return (self.weight - batch["example_id"].sum()) ** 2

    def on_train_epoch_start(self) -> None:
        loader: Any = self.trainer.train_dataloader
        self.epochs.append(loader.sampler.epoch)

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.validated += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


@pytest.fixture
def pool(tmp_path: Path) -> str:
    """49 rows, hence 13 batches of 4."""
    rows = [{"prompt": "the sea", "response": "is wide " * (1 + i % 7)} for i in range(49)]
    return write_jsonl(tmp_path / "pool.jsonl", rows)


def data(pool: str, **options: Any) -> InstructionDataModule:
    """A data module over the pool."""
    return InstructionDataModule(**{"train": pool, "tokenizer": byte_level(), "batch_size": 4, **options})


def fit(
    module: Watcher, data: InstructionDataModule, folder: Path, ckpt_path: str | None = None, **options: Any
) -> None:
    """Trains, quietly, from the start or from a checkpoint."""
    trainer = pl.Trainer(
        **{"max_epochs": 3, "enable_checkpointing": False, **options},
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=ckpt_path is not None or None)


def checkpoints(folder: Path, every: int) -> dict[str, Any]:
    """Trainer options that keep a checkpoint of every so many optimizer steps."""
    callback = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    return {"callbacks": [callback, KeepEpochCount()], "enable_checkpointing": True}


def test_lightning_sets_every_epoch(pool: str, tmp_path: Path) -> None:
    """In a real fit the sampler hears of every epoch before it starts; each epoch sees each example once, reordered."""
    module = Watcher()
    fit(module, data(pool, validation=pool), tmp_path)
    assert module.epochs == [0, 1, 2]
    epochs = [[ids for epoch, ids in module.steps if epoch == number] for number in range(3)]
    assert all(sorted(chain.from_iterable(batches)) == list(range(49)) for batches in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert module.validated > 0


def test_no_warning_on_many_cores(pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's advice to use more workers, which it gives on larger machines, stays away: it does not apply."""
    monkeypatch.setattr("lightning.fabric.utilities.data._num_cpus_available", lambda: 64)
    fit(Watcher(), data(pool, validation=pool), tmp_path, max_epochs=1)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("validate", [False, True])
def test_resumption_at_every_step(pool: str, tmp_path: Path, accumulate: int, validate: bool) -> None:
    """A run killed after any optimizer step, ends of epochs included, goes on with exactly the steps left to do."""
    source = {"validation": pool} if validate else {}

    def run(module: Watcher, path: str | None = None) -> None:
        options = {"accumulate_grad_batches": accumulate, "max_epochs": 2, **checkpoints(tmp_path / "all", 1)}
        fit(module, data(pool, **source), tmp_path, path, **options)

    whole = Watcher()
    run(whole)
    per_epoch = len(whole.steps) // 2
    assert per_epoch % 2 == 1  # so that the last step of an epoch accumulates fewer batches
    ends = [end for end in range(1, per_epoch + 1) if end % accumulate == 0 or end == per_epoch]
    seen = ends + [per_epoch + end for end in ends]
    for step, done in enumerate(seen[:-1], start=1):
        resumed = Watcher()
        run(resumed, str(tmp_path / "all" / f"step={step}.ckpt"))
        assert resumed.steps == whole.steps[done:], f"resumed after optimizer step {step}"
        assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("die_after", [4, 9, 17, 20])
def test_killed_run(pool: str, tmp_path: Path, die_after: int, packing: bool) -> None:
    """A run that dies between checkpoints goes on from the last one as the unbroken run did from there."""

    def run(module: Watcher, path: str | None = None, **options: Any) -> None:
        fit(module, data(pool, packing=packing), tmp_path, path, accumulate_grad_batches=2, **options)

    whole, killed, resumed = Watcher(), Watcher(die_after), Watcher()
    run(whole)
    with pytest.raises(InterruptedRunError):
        run(killed, **checkpoints(tmp_path / "some", 2))
    last = max((tmp_path / "some").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    run(resumed, str(last), **checkpoints(tmp_path / "some", 2))
    assert resumed.steps == whole.steps[-len(resumed.steps) :]
    assert die_after - 4 <= len(whole.steps) - len(resumed.steps) <= die_after
    assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize("lives", [(5, 4, 8), (13, 4), (13, 13), (6, 7, 2)], ids=str)
def test_resuming_repeatedly(pool: str, tmp_path: Path, lives: tuple[int, ...]) -> None:
    """A resumed run's own checkpoints can be resumed from: in mid-epoch, in a later one, and around an epoch's end."""
    whole = Watcher()
    fit(whole, data(pool), tmp_path)
    path = None
    done = 0
    for die_after in (*lives, None):
        module = Watcher(die_after)
        with pytest.raises(InterruptedRunError) if die_after else nullcontext():
            fit(module, data(pool), tmp_path, path, **checkpoints(tmp_path / "all", 1))
        assert module.steps == whole.steps[done:][:die_after]
        done += len(module.steps)
        path = str(tmp_path / "all" / f"step={done}.ckpt")
    assert done == len(whole.steps)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # Python 3.12 on any forked worker
@pytest.mark.parametrize("packing", [False, True])
def test_workers_hand_out_the_same_batches(pool: str, packing: bool) -> None:
    """Batches prepared ahead by workers are counted when handed out, not when prepared."""
    here, there = (data(pool, num_workers=count, packing=packing).train_dataloader() for count in (0, 1))
    expected = [batch["example_id"].tolist() for batch in here]
    iterator = iter(there)
    first = [next(iterator)["example_id"].tolist() for _ in range(3)]
    state = there.state_dict()
    assert (first, state["yielded"]) == (expected[:3], 3)
    del iterator
    fresh: ResumableLoader = data(pool, num_workers=1, packing=packing).train_dataloader()
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state
    assert [batch["example_id"].tolist() for batch in fresh] == expected[3:]


def test_state_of_another_epoch_or_other_data(pool: str) -> None:
    """A position counts for its own epoch alone, once; a state from a different number of batches is refused."""
    loader = data(pool).train_dataloader()
    state = {"epoch": 0, "yielded": 3, "batches": len(loader)}
    loader.load_state_dict(state)
    assert [len(list(loader)), len(list(loader))] == [len(loader) - 3, len(loader)]
    loader.load_state_dict(state)
    sampler: Any = loader.sampler
    sampler.set_epoch(1)
    assert len(list(loader)) == len(loader)
    with pytest.raises(UserError, match=r"checkpoint was made with 99 batches per epoch but the data now give 13"):
        loader.load_state_dict({**state, "batches": 99})


@pytest.mark.parametrize(
    ("kind", "num_workers"), [("training", 0), ("packed training", 0), ("packed training", 1), ("validation", 0)]
)
def test_a_part_of_each_batch_is_read_alone(
    pool: str, kind: str, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one of three that share it, who knows what all have; the last row stands in for none, without labels."""
    read: list[int] = []
    sizes: dict[str, Any] = {"batch_size": 5, "batch_tokens": 80, "num_workers": num_workers}
    packing = kind == "packed training"
    data = InstructionDataModule(train=pool, validation=pool, tokenizer=byte_level(), packing=packing, **sizes)
    plain = RowLists.__getitem__

    def noted(self: RowLists, ids: list[int]) -> Any:
        read.extend(ids)
        return plain(self, ids)

    def batches(part: slice | None) -> list[Batch]:
        data.part = part
        return [*(data.val_dataloader() if kind == "validation" else data.train_dataloader())]

    whole = batches(None)
    monkeypatch.setattr(RowLists, "__getitem__", noted)
    parts = [batches(slice(k, None, 3)) for k in range(3)]
    for batch, *of_batch in zip(whole, *parts, strict=True):
        assert [extent_of(part) for part in of_batch] == [extent_of(batch)] * 3
        learnt = [part for part in of_batch if bool((part["labels"] != -100).any())]
        ids = [i for part in learnt for i in part["example_id"].tolist()]
        assert sorted(ids) == sorted(batch["example_id"].tolist())
    if num_workers == 0:
        assert read == [i for of_rank in parts for part in of_rank for i in part["example_id"].tolist()]
