"""A tiny base model, pool and selection, and fine-tuning runs over them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule
from lightning import Trainer as LightningTrainer
from torch import Tensor

from dualsft.cli import run
from dualsft.data import InstructionDataModule, read_records
from dualsft.finetune import MaskedFinetuneModule
from dualsft.models.loading import load_model, model_fingerprint
from dualsft.selection.artifact import write_selection
from dualsft.trainer import Trainer
from tests.cases import random_mask, save_tiny_model, sums, write_jsonl

POOL, CHOSEN = 24, [0, 1, 2, 4, 5, 7, 9, 10, 12, 13, 14, 16, 17, 18, 20, 21, 22]


@dataclass(frozen=True)
class Workspace:
    """Paths of what a run needs."""

    folder: Path
    base: str
    pool: str
    validation: str
    selection: str

    def module(self, **options: Any) -> MaskedFinetuneModule:
        """A module over the base model and the selection, with a learning rate that shows."""
        return MaskedFinetuneModule(
            **{"model_name_or_path": self.base, "selection": self.selection, "optimizer": adamw, **options}
        )

    def data(self, **options: Any) -> InstructionDataModule:
        """The pool's selected examples in batches of up to four, and the validation set."""
        settings = {
            "train": self.pool,
            "validation": self.validation,
            "tokenizer": self.base,
            "selection": self.selection,
            "batch_tokens": 400,
            "max_length": 100,
            "batch_size": 4,
            "seed": 3,
        }
        return InstructionDataModule(**{**settings, **options})


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW with weight decay."""
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


def make_workspace(folder: Path, dtype: torch.dtype = torch.float32) -> Workspace:
    """Write a base model, 24 rows of pool, a validation set, and a selection of 30% of the weights and 17 rows."""
    base = save_tiny_model(folder / "base", dtype=dtype)
    pool = write_jsonl(folder / "pool.jsonl", sums(POOL))
    validation = write_jsonl(folder / "validation.jsonl", sums(30)[POOL:])
    mask = random_mask(load_model(base), 0.3)
    mask["model.norm.weight"][:] = True
    mask["model.layers.1.self_attn.k_proj.weight"][:] = False
    selection = select(folder / "selection", base, pool, mask, CHOSEN)
    return Workspace(folder, base, pool, validation, selection)


MANIFEST = Path(__file__).parents[1] / "selection" / "manifest.json"
"""Of a tiny selection."""


def select(folder: Path, base: str, pool: str, mask: dict[str, Tensor], chosen: Sequence[int]) -> str:
    """Write a selection directory of these weights and rows."""
    folder.mkdir(parents=True)
    records = read_records(pool)
    rows = range(len(records))
    manifest = json.loads(MANIFEST.read_text(encoding="utf-8"))
    manifest["model"].update(name_or_path=base, fingerprint=model_fingerprint(base))
    manifest["data"]["train"].update(path=pool, fingerprint=records.fingerprint)
    write_selection(
        folder,
        manifest=manifest,
        examples={
            "example_id": list(rows),
            "score": [0.0] * len(records),
            "num_tokens": [1] * len(records),
            "status": ["ok"] * len(records),
            "selected": [row in chosen for row in rows],
        },
        parameter_scores={name: chosen.float() for name, chosen in mask.items()},
        mask=mask,
        selected_lines=[records.line(row) for row in chosen],
        config="",
    )
    return str(folder)


def trainer(folder: Path, **options: Any) -> Trainer:
    """A quiet trainer on the CPU: two epochs, no checkpoints, no log."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": "callbacks" in options,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
    }
    return Trainer(**{**quiet, **options})


def weights(module: MaskedFinetuneModule) -> dict[str, Tensor]:
    """A copy of the model's weights."""
    return {name: weight.detach().clone() for name, weight in module.model.named_parameters()}


class SaveOften(Callback):
    """Saves a checkpoint after every training batch, in mid-accumulation too."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_train_batch_end(
        self, trainer: LightningTrainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.save_checkpoint(self._folder / f"{trainer.current_epoch}-{batch_idx}.ckpt")


def fit(workspace: Workspace, folder: Path, *arguments: str, epochs: int = 3) -> None:
    """`dualsft fit` over the workspace: epochs of two batches."""
    run(fit_options(workspace, folder, *arguments, epochs=epochs))


def fit_options(workspace: Workspace, folder: Path, *arguments: str, epochs: int = 3) -> list[str]:
    """The command line of `fit`; the arguments may override."""
    at = {
        "--model.model_name_or_path": workspace.base,
        "--model.selection": workspace.selection,
        "--data.train": workspace.pool,
        "--data.validation": workspace.validation,
        "--data.batch_size": "4",
        "--output_dir": str(folder),
        "--model.samples.number": "0",
        "--trainer.max_epochs": str(epochs),
        "--trainer.limit_train_batches": "2",
        "--trainer.accelerator": "cpu",
        "--trainer.enable_progress_bar": "false",
    }
    return ["fit", *(part for pair in at.items() for part in pair), *arguments]
