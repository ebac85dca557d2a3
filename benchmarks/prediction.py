"""What first and second order predict of a step, and what the step brings, on the embedded Llama and real text.

    python benchmarks/prediction.py          about four minutes

For a pool of target rows and for a mixed one, without preconditioner at the base model and with Adam's after a warm-up,
`dualsft select` with the scorer hessian_vector and step_size auto tells <v, d> and dᵀHd along the pool step d. The
weights are then moved by shares of that step, and the fall of the validation loss is measured.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dualsft import InstructionDataModule, SelectionModule
from dualsft.matrix.passes import gradient_pass
from dualsft.models.loading import load_model
from dualsft.objectives import example_losses
from dualsft.quickstart import ASSETS, GSM8K
from dualsft.scorers import HessianVector
from dualsft.selection import Warmup
from dualsft.selection.directions import preconditioner
from dualsft.trainer import Trainer

SHARES = (0.1, 0.25, 0.5, 1.0)
MODEL = str(ASSETS / "model")


def write_rows(source: Path, target: Path, kind: str | None, count: int, every: int = 1) -> str:
    """So many rows of a file, of one source if asked, one in every so many."""
    records = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    found = [record for record in records if kind is None or record["source"] == kind][::every][:count]
    target.write_text("".join(f"{json.dumps(record)}\n" for record in found), encoding="utf-8")
    return str(target)


@torch.no_grad()
def validation_loss(model: Any, data: InstructionDataModule) -> float:
    """Mean over the validation examples, nats per supervised token."""
    losses = [example_losses(model, batch) for batch in data.validation_loader()]
    return float(torch.cat(losses).double().mean())


def pool_step(checkpoint: str, data: InstructionDataModule, adam: bool) -> tuple[Any, dict[str, Tensor]]:
    """The model at the scoring checkpoint, and d = P ⊙ ḡ."""
    model = load_model(checkpoint, "float32").eval()
    found = gradient_pass(model, lambda first: data.pool_loader(start=first))
    p = preconditioner(model, load_file(Path(checkpoint) / "second_moment.safetensors") if adam else None)
    return model, {name: p[name] * total / found.counted for name, total in found.sums.items()}


def compare(pool: str, validation: str, adam: bool, folder: Path) -> None:
    """Print one table."""
    warmup = Warmup(fraction=0.5, learning_rate=1e-4, keep=True) if adam else Warmup(fraction=0.0)
    settings: dict[str, Any] = {"preconditioner": "adam" if adam else "none", "warmup": warmup, "dtype": "float32"}
    data = InstructionDataModule(pool, validation, tokenizer=MODEL, max_length=256, batch_tokens=2048)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", enable_model_summary=False, **quiet)
    module = SelectionModule(MODEL, scorer=HessianVector(), step_size="auto", **settings)
    told = trainer.select(module, data, str(folder)).about.prediction
    assert told is not None
    assert told.curvature is not None  # HessianVector gives one
    model, step = pool_step(str(folder / "warmup") if adam else MODEL, data, adam)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = validation_loss(model, data)
    print(f"{Path(pool).stem} pool, {settings['preconditioner']}: auto step size {told.step_size:.3g}")
    print("  share of it   measured   first order   second order")
    for share in SHARES:
        size = share * told.step_size
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name] - size * step[name])
        first = size * told.slope
        second = first - size**2 / 2 * told.curvature
        print(f"  {share:11.2f} {before - validation_loss(model, data):10.5f} {first:13.5f} {second:14.5f}")


def main() -> None:
    """Print all tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        validation = write_rows(GSM8K / "validation.jsonl", folder / "validation.jsonl", None, 48)
        pools = {
            "target": write_rows(GSM8K / "pool.jsonl", folder / "target.jsonl", "target", 64),
            "mixed": write_rows(GSM8K / "pool.jsonl", folder / "mixed.jsonl", None, 64, every=20),
        }
        for kind, pool in pools.items():
            for adam in (False, True):
                compare(pool, validation, adam, folder / f"{kind}-{adam}")


if __name__ == "__main__":
    main()
