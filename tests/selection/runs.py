"""Selections of a tiny model over a tiny pool, through the real trainer."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from dualsft import InstructionDataModule, SelectionModule
from dualsft.models.loading import load_model
from dualsft.selection import Selection, Warmup
from dualsft.trainer import Trainer
from tests.cases import save_tiny_model
from tests.selection.tiny import Example, Gradients, gradient_loop, inner, total

MAX_LENGTH = 48
LINES = [
    '{"prompt": "What is 2 + 2?",   "response": "4, of course."}',
    '{"prompt": "no answer", "response": ""}',
    '{"response": "keys in another order", "prompt": "And?"}',
    '{"prompt": "' + "very long " * 20 + '", "response": "cut away"}',
    '{"prompt": "line ends", "response": "a\u2028b\u0085c"}',
    '{"prompt": "escaped", "response": "\\u00e9\\n\\"é\\"", "extra": [1, {"a": null}]}',
    '{"prompt": "x", "response": "y"}',
    '{"prompt": "The sea?", "response": "Wide and deep, deep and wide."}',
    '{"prompt": "The sea?", "response": "Wide and deep, deep and wide."}',
    '{"prompt": "Paris", "response": "is the capital of France."}',
]
STATUS = ["ok", "empty", "ok", "truncated", "ok", "ok", "ok", "ok", "ok", "ok"]
OK = [i for i, status in enumerate(STATUS) if status == "ok"]
VALIDATION = [
    '{"prompt": "What is 1 + 1?", "response": "2, of course."}',
    '{"prompt": "", "response": ""}',
    '{"prompt": "Rome", "response": "is the capital of Italy."}',
]
SGD: dict[str, Any] = {"preconditioner": "none", "warmup": Warmup(fraction=0.0)}
ADAM: dict[str, Any] = {"warmup": Warmup(fraction=0.5, epochs=2, learning_rate=1e-3)}


@dataclass(frozen=True)
class Inputs:
    """What a selection is made from."""

    model: str
    train: str
    validation: str

    def data(self, **options: Any) -> InstructionDataModule:
        """A data module with small batches, so that there are several."""
        settings = {"tokenizer": self.model, "max_length": MAX_LENGTH, "batch_tokens": 100, "batch_size": 2, **options}
        return InstructionDataModule(self.train, self.validation, **settings)

    def examples(self, which: str) -> dict[int, Example]:
        """Token ids and labels by example id, of the examples that have labels."""
        data = self.data()
        examples = data.train_examples if which == "train" else data.validation_sets["validation"]
        rows = (examples.dataset[i] for i in examples.ok_ids())
        return {row["example_id"]: (list(row["input_ids"]), list(row["labels"])) for row in rows}


def write_inputs(folder: Path, **model_options: Any) -> Inputs:
    """The model and both files."""
    for name, lines in (("train", LINES), ("validation", VALIDATION)):
        (folder / f"{name}.jsonl").write_bytes("".join(f"{line}\n" for line in lines).encode())
    model = save_tiny_model(folder / "model", **model_options)
    return Inputs(model, str(folder / "train.jsonl"), str(folder / "validation.jsonl"))


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
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **(ranks or {}),
    )
    return trainer.select(SelectionModule(inputs.model, **options), inputs.data(**(data or {})), str(folder), **run)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, the manifest's without what a run cost."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if "manifest.json" in found:
        manifest = json.loads(found["manifest.json"])
        del manifest["phases"]
        found["manifest.json"] = json.dumps(manifest).encode()
    return found


def slow_scores(
    inputs: Inputs, checkpoint: str, step_size: float, preconditioner: Callable[[str], Any] = lambda _: 1.0
) -> tuple[dict[int, float], Gradients]:
    """Both score vectors by a loop of autograd over examples, in float64: φ_i and φ_j."""
    model: PreTrainedModel = load_model(checkpoint, "float64").eval()
    pool = inputs.examples("train")
    target = inputs.examples("validation")
    summed = total(gradient_loop(model, target.values()))
    u = {name: step_size / len(pool) * preconditioner(name) * g / len(target) for name, g in summed.items()}
    gradients = gradient_loop(model, pool.values())
    rows = {i: inner(u, g) for i, g in zip(pool, gradients, strict=True)}
    return rows, {name: u[name] * g for name, g in total(gradients).items()}
