"""A model with its pool and validation set, and what is done with them: select, fit."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, LightningModule
from lightning import Trainer as LightningTrainer
from torch import Tensor

from dualsft import InstructionDataModule, SelectionModule
from dualsft.cli import run
from dualsft.data.records import read_records
from dualsft.data.tokenizer import load_tokenizer
from dualsft.finetune import MaskedFinetuneModule
from dualsft.models.configuration import stored_configuration
from dualsft.models.loading import load_model, model_fingerprint, tokenizer_fingerprint
from dualsft.selection import Selection, Warmup
from dualsft.selection.writing import write_selection
from dualsft.trainer import Trainer
from tests.cases import Example
from tests.world.data import LINES, VALIDATION, Row, random_mask, sums, write_jsonl
from tests.world.models import save_tiny_model

MAX_LENGTH = 48
SGD: dict[str, Any] = {"preconditioner": "none", "warmup": Warmup(fraction=0.0)}
ADAM: dict[str, Any] = {"warmup": Warmup(fraction=0.5, epochs=2, learning_rate=1e-3)}
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
POOL, CHOSEN = 24, [0, 1, 2, 4, 5, 7, 9, 10, 12, 13, 14, 16, 17, 18, 20, 21, 22]
MANIFEST = Path(__file__).parents[1] / "selection" / "manifest.json"
"""Of a tiny selection."""


def trainer(folder: Path | None = None, **options: Any) -> Trainer:
    """A quiet trainer on the CPU: two epochs, no log, no checkpoints unless there are callbacks."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": "callbacks" in options,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return Trainer(**{**quiet, **options})


# What a job needs


@dataclass(frozen=True)
class Inputs:
    """Paths of what a selection is made from: a model's folder, a pool and a validation set."""

    model: str
    train: str
    validation: str

    def data(self, **options: Any) -> InstructionDataModule:
        """A data module with small batches, so that there are several."""
        sources = {"train": self.train, "validation": self.validation, "tokenizer": self.model}
        settings = {"max_length": MAX_LENGTH, "batch_tokens": 100, "batch_size": 2}
        return InstructionDataModule(**{**sources, **settings, **options})

    def examples(self, which: str) -> dict[int, Example]:
        """Token ids and labels by example id, of the examples that have labels."""
        data = self.data()
        examples = data.train_examples if which == "train" else data.validation_sets["validation"]
        rows = (examples.dataset[i] for i in examples.ok_ids())
        return {row["example_id"]: (list(row["input_ids"]), list(row["labels"])) for row in rows}


def write_inputs(
    folder: Path, train: Iterable[Row] = LINES, validation: Iterable[Row] = VALIDATION, **model_options: Any
) -> Inputs:
    """Writes a tiny model (its options are those of `save_tiny_model`), a pool and a validation set."""
    folder.mkdir(parents=True, exist_ok=True)
    return Inputs(
        save_tiny_model(folder / "model", **model_options),
        write_jsonl(folder / "train.jsonl", train),
        write_jsonl(folder / "validation.jsonl", validation),
    )


def write_job(folder: Path, inputs: Inputs, **sections: Any) -> Path:
    """Writes ``job.yaml``, one configuration for `select` and `fit`; sections add to the usual ones."""
    usual: dict[str, dict[str, Any]] = {
        "model": {"model_name_or_path": inputs.model, "samples": {"number": 0}},
        "data": {"train": inputs.train, "validation": inputs.validation},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    config = usual | {n: {**usual[n], **given} if n in usual else given for n, given in sections.items()}
    (folder / "job.yaml").write_text(yaml.safe_dump(config))
    return folder / "job.yaml"


# Selections


def select(
    inputs: Inputs,
    folder: Path,
    options: dict[str, Any],
    data: dict[str, Any] | None = None,
    precision: str = "32-true",
    ranks: dict[str, Any] | None = None,
    **run: Any,
) -> Selection:
    """A real selection; `options` are the module's, `ranks` and `run` those of the trainer and `Trainer.select`."""
    module = SelectionModule(inputs.model, **options)
    return trainer(precision=precision, **(ranks or {})).select(module, inputs.data(**(data or {})), str(folder), **run)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, the manifest's without what a run cost."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if "manifest.json" in found:
        manifest = json.loads(found["manifest.json"])
        del manifest["phases"]
        found["manifest.json"] = json.dumps(manifest).encode()
    return found


# Fits


@dataclass(frozen=True)
class Workspace(Inputs):
    """What a fit needs: these inputs and a selection from them, all in one folder."""

    folder: Path
    selection: str

    def module(self, **options: Any) -> MaskedFinetuneModule:
        """A module over the base model and the selection, with a learning rate that shows."""
        return MaskedFinetuneModule(
            **{"model_name_or_path": self.model, "selection": self.selection, "optimizer": adamw, **options}
        )

    def data(self, **options: Any) -> InstructionDataModule:
        """The pool's selected examples in batches of up to four, and the validation set."""
        settings = {"selection": self.selection, "max_length": 100, "batch_tokens": 400, "batch_size": 4, "seed": 3}
        return super().data(**{**settings, **options})


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW with weight decay."""
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


def make_workspace(folder: Path, dtype: torch.dtype = torch.float32) -> Workspace:
    """Writes a base model, 24 rows of pool, a validation set, and a selection of 30% of the weights and 17 rows."""
    rows = sums(30)
    inputs = write_inputs(folder / "inputs", rows[:POOL], rows[POOL:], dtype=dtype)
    mask = random_mask(load_model(inputs.model), 0.3)
    mask["model.norm.weight"][:] = True
    mask["model.layers.1.self_attn.k_proj.weight"][:] = False
    selection = save_selection(folder / "selection", inputs, mask, CHOSEN)
    return Workspace(inputs.model, inputs.train, inputs.validation, folder, selection)


def save_selection(folder: Path, inputs: Inputs, mask: dict[str, Tensor], chosen: Sequence[int]) -> str:
    """Writes a selection of these weights and rows, which nobody has scored."""
    folder.mkdir(parents=True)
    records = read_records(inputs.train)
    rows = range(len(records))
    manifest = json.loads(MANIFEST.read_text(encoding="utf-8"))
    manifest["model"].update(name_or_path=inputs.model, fingerprint=model_fingerprint(inputs.model))
    manifest["configuration"] = stored_configuration(Path(inputs.model))
    manifest["tokenizer"]["fingerprint"] = tokenizer_fingerprint(load_tokenizer(inputs.model))
    manifest["data"]["train"].update(path=inputs.train, fingerprint=records.fingerprint)
    manifest["counts"]["examples"].update(rows=len(records), selected=len(chosen))
    weights = {
        "selected": sum(int(part.sum()) for part in mask.values()),
        "scored": sum(part.numel() for part in mask.values()),
    }
    manifest["counts"]["parameters"].update(weights)
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
        "--model.model_name_or_path": workspace.model,
        "--model.selection": workspace.selection,
        "--data.train": workspace.train,
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
