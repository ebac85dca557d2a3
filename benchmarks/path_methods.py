"""The methods that `benchmarks/paths.py` compares: how examples are scored, and by which rule weights are chosen."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from dualsft_baselines import LessCheckpoints, Lift, TrainOnValidation
from torch import Tensor

from dualsft import InstructionDataModule, SelectionModule
from dualsft.models.loading import load_model
from dualsft.objectives import example_losses
from dualsft.paths import PoolPath, TargetPath
from dualsft.quickstart.control import random_mask
from dualsft.scorers import HessianVector
from dualsft.selection import Selection, Warmup
from dualsft.selection.paths.settings import Normalization, PathSettings
from dualsft.selection.prior import Prior
from dualsft.trainer import Trainer

MODEL = str(Path(__file__).parents[1] / "dualsft" / "quickstart" / "assets" / "model")
RATE, BATCH = 1e-3, 8
TO_TARGET = PathSettings(along=TargetPath(), learning_rate=RATE, normalize="none")
WARM, BASE = Warmup(fraction=0.1, learning_rate=RATE), Warmup(fraction=0.0)
NORMALIZATIONS: dict[str, Normalization] = {
    "fall": "none",
    "share of the loss": "initial_loss",
    "smoothed share": "smoothed_loss",
    "length": "length",
}
SCORES: dict[str, dict[str, Any]] = {
    "first order": {"warmup": WARM},
    "first order, defaults": {},
    "first order, tokens": {"warmup": WARM, "normalize": "tokens"},
    "first order, cosine (LESS)": {"warmup": WARM, "normalize": "gradient_norm"},
    "second order": {"warmup": WARM, "scorer": HessianVector(), "step_size": RATE},
    "prior": {"warmup": WARM, "prior": Prior(weight=0.2)},
    "pool's path, 4 epochs (TracIn)": {"warmup": WARM, "path": PathSettings(along=PoolPath(), epochs=4, pieces=4)},
    "LESS, 4 epochs": {"warmup": WARM, "path": PathSettings(along=LessCheckpoints(), epochs=4)},
    "Train on Validation": {
        "warmup": BASE,
        "path": PathSettings(along=TrainOnValidation(), learning_rate=RATE, held_out=0.0),
        "parameter_budget": None,
    },
    **{
        f"target's path{start}, {name}": {
            "warmup": warmup,
            "path": replace(TO_TARGET, normalize=normalize),
            "parameter_budget": None,
        }
        for start, warmup in (("", BASE), (" after the warm-up", WARM))
        for name, normalize in NORMALIZATIONS.items()
    },
}
"""How examples are scored; the learning rate of warm-ups and paths is that of the fits, but for the defaults."""


@dataclass(frozen=True)
class Experiment:
    """One pool under one seed.

    Attributes:
        folder: Its records and selections.
        kind: The pool's.
        seed: Decides the pool, the warm-up and the order of training.
    """

    folder: Path
    kind: str
    seed: int

    def data(self, validation: str = "validation") -> InstructionDataModule:
        """The pool, and a file as validation set."""
        train, held = self.folder / "train.jsonl", self.folder / f"{validation}.jsonl"
        return InstructionDataModule(
            str(train), str(held), MODEL, max_length=256, batch_tokens=4096, batch_size=BATCH, seed=self.seed
        )

    def rows(self, name: str) -> list[dict[str, str]]:
        """The records of a file."""
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]

    def select(self, name: str, options: dict[str, Any]) -> Selection:
        """A selection of a tenth of the examples and, unless the options say otherwise, of the weights."""
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(accelerator="cpu", enable_model_summary=False, **quiet)
        module = SelectionModule(MODEL, dtype="float32", data_budget=0.1, **options)
        folder = self.folder / re.sub(r"[^\w-]", "", name.replace(" ", "-"))
        return trainer.select(module, self.data(), str(folder), resume=True, seed=self.seed)


def top(values: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """The mask of the largest values, this share of all."""
    flat = torch.cat([value.flatten() for value in values.values()])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.topk(round(share * len(flat))).indices] = True
    parts = mask.split([value.numel() for value in values.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(values.items(), parts, strict=True)}


def weights() -> dict[str, Tensor]:
    """The base model's weights."""
    return {name: p.detach() for name, p in load_model(MODEL, "float32").named_parameters()}


def validation_gradient(experiment: Experiment) -> dict[str, Tensor]:
    """v at the base model."""
    model = load_model(MODEL, "float32").eval()
    for batch in experiment.data().validation_loader():
        example_losses(model, batch).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def local(experiment: Experiment, share: float) -> dict[str, Tensor]:
    """|φ_j| at the scoring checkpoint, the default."""
    found = experiment.select("first order", SCORES["first order"]).parameter_scores()
    return top({name: score.abs() for name, score in found.items()}, share)


def along(columns: Any, signed: bool) -> Callable[[Experiment, float], dict[str, Tensor]]:
    """Columns along the path from the base model to the target, by their size or by what is gained alone."""

    def rule(experiment: Experiment, share: float) -> dict[str, Tensor]:
        found = along_scores(experiment, columns)
        return top(found if signed else {name: score.abs() for name, score in found.items()}, share)

    return rule


def guarded(experiment: Experiment, share: float) -> dict[str, Tensor]:
    """The target's columns less the general rows' along the same path, each as a share of its sum."""
    both = {c: along_scores(experiment, c) for c in ("target", "pool")}
    sizes = {c: sum(float(s.abs().sum()) for s in of.values()) for c, of in both.items()}
    value = {n: both["target"][n].abs() / sizes["target"] - both["pool"][n].abs() / sizes["pool"] for n in both["pool"]}
    return top(value, share)


def along_scores(experiment: Experiment, columns: Any) -> dict[str, Tensor]:
    """The columns of a kind along the path from the base model to the target, on eight pieces whatever their error."""
    options = {"warmup": BASE, "path": replace(TO_TARGET, columns=columns, tolerance=1.0)}
    return experiment.select(f"columns {columns}", options).parameter_scores()


def lift(experiment: Experiment, share: float) -> dict[str, Tensor]:
    """The principal weights of the base model, by the baselines' allocator."""
    options = {"parameter_allocator": Lift(), "parameter_budget": share}
    return experiment.select(f"lift {share}", SCORES["first order"] | options).mask()


def random_weights(experiment: Experiment, share: float) -> dict[str, Tensor]:
    """As many weights at random."""
    return random_mask(top(weights(), share), torch.Generator().manual_seed(experiment.seed))


MASKS: dict[str, Callable[[Experiment, float], dict[str, Tensor]]] = {
    "size of the local score": local,
    "target's path, over the target": along("target", signed=False),
    "target's path, over the target, gains": along("target", signed=True),
    "target's path, over the pool": along("pool", signed=False),
    "target's path, product": along("product", signed=False),
    "target's path, over the target less the pool": guarded,
    "magnitude": lambda _, share: top({n: w.abs() for n, w in weights().items()}, share),
    "validation gradient (SIFT)": lambda e, share: top({n: g.abs() for n, g in validation_gradient(e).items()}, share),
    "principal weights (LIFT)": lift,
    "random": random_weights,
}
