"""Which scores find the rows worth training on, and which weights: paths beside scores at one checkpoint, over seeds.

    python benchmarks/paths.py --seeds 5 --output_dir runs/paths                    every pool, every score, every fit
    python benchmarks/paths.py --pools wrong clean --size 640 --seeds 5 --stages scores --output_dir runs/paths
    python benchmarks/paths.py --data DIR ...          the pool gsm8k too: GSM8K among general instructions, from DIR

Three stages, whose figures are kept in the output folder, so that a second start repeats nothing: `scores` ranks each
pool by each score; `fits` trains all weights on each chosen tenth; `masks` trains the clean rows under each mask, at
the learning rate that is best for it on the validation set. Prints means over the seeds with 95% intervals.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from path_pools import GENERAL, SPOILERS, SPOILT, TARGET, make_pool
from torch import Tensor
from torch.optim import AdamW

from dualsft import InstructionDataModule, SelectionModule
from dualsft.data.layout import Batch
from dualsft.data.tokenizer import load_tokenizer
from dualsft.models import PreTrainedModel
from dualsft.models.loading import load_model
from dualsft.objectives import example_losses
from dualsft.paths import PoolPath, TargetPath
from dualsft.quickstart.control import random_mask
from dualsft.scorers import HessianVector
from dualsft.selection import Selection, Warmup
from dualsft.selection.paths.settings import PathSettings
from dualsft.selection.prior import Prior
from dualsft.trainer import Trainer
from dualsft.training.compact import CompactParameters

MODEL = str(Path(__file__).parents[1] / "dualsft" / "quickstart" / "assets" / "model")
RATE, EPOCHS, BATCH = 1e-3, 3, 8
MASK_RATES = (1e-3, 3e-3, 1e-2)
SHARES = (0.01, 0.05, 0.1)
TO_TARGET = PathSettings(along=TargetPath(), learning_rate=RATE, normalize="none")
WARM = Warmup(fraction=0.1, learning_rate=RATE)
SCORES: dict[str, dict[str, Any]] = {
    "first order": {"warmup": WARM},
    "first order, defaults": {},
    "first order, tokens": {"warmup": WARM, "normalize": "tokens"},
    "first order, cosine (LESS)": {"warmup": WARM, "normalize": "gradient_norm"},
    "second order": {"warmup": WARM, "scorer": HessianVector(), "step_size": RATE},
    "prior": {"warmup": WARM, "prior": Prior(weight=0.2)},
    "pool's path, 4 epochs": {"warmup": WARM, "path": PathSettings(along=PoolPath(), epochs=4, pieces=4)},
    "target's path, fall": {"path": TO_TARGET, "parameter_budget": None},
    "target's path, share of the loss": {
        "path": PathSettings(along=TargetPath(), learning_rate=RATE, normalize="initial_loss"),
        "parameter_budget": None,
    },
    "target's path, length": {
        "path": PathSettings(along=TargetPath(), learning_rate=RATE, normalize="length"),
        "parameter_budget": None,
    },
    "target's path, all 8 epochs": {
        "path": PathSettings(along=TargetPath(), learning_rate=RATE, normalize="initial_loss", epochs=8, held_out=0.0),
        "parameter_budget": None,
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

    def data(self) -> InstructionDataModule:
        """The pool and the validation set."""
        train, validation = self.folder / "train.jsonl", self.folder / "validation.jsonl"
        return InstructionDataModule(
            str(train), str(validation), MODEL, max_length=256, batch_tokens=4096, batch_size=BATCH, seed=self.seed
        )

    def rows(self, name: str) -> list[dict[str, str]]:
        """The records of a file."""
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]

    def select(self, name: str, options: dict[str, Any]) -> Selection:
        """A selection of a tenth of the examples and, unless the options say otherwise, of the weights."""
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(accelerator="cpu", enable_model_summary=False, **quiet)  # type: ignore[arg-type]
        module = SelectionModule(MODEL, dtype="float32", data_budget=0.1, **options)
        folder = self.folder / name.replace(" ", "-").replace(",", "").replace("'", "")
        return trainer.select(module, self.data(), str(folder), resume=True, seed=self.seed)


# What is measured


def auc(positive: Tensor, negative: Tensor) -> float:
    """The chance that a positive outranks a negative, ties counting half."""
    wins = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative).double()
    return float(wins.mean())


def score_figures(experiment: Experiment, selection: Selection) -> dict[str, float]:
    """How well the scores tell clean target rows from others."""
    sources = [row["source"] for row in experiment.rows("train")]
    scores = torch.tensor([-math.inf if s is None else s for s in selection.examples["score"].to_pylist()])
    of = {s: scores[[i for i, source in enumerate(sources) if source == s]] for s in (TARGET, SPOILT, GENERAL)}
    chosen = [sources[i] for i in selection.example_ids]
    figures = {"clean among the chosen": chosen.count(TARGET) / len(chosen)}
    for other in (SPOILT, GENERAL):
        if len(of[other]):
            figures[f"AUC against {other}"] = auc(of[TARGET], of[other])
    figures["seconds"] = sum(phase.seconds for phase in selection.about.phases)
    return figures


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Iterator[Batch] | Any) -> float:
    """The mean loss of the batches' examples."""
    model.eval()
    return statistics.fmean(float(loss) for batch in batches for loss in example_losses(model, batch))


@torch.no_grad()
def exact_match(model: PreTrainedModel, rows: list[dict[str, str]]) -> float:
    """The share of the rows whose response greedy generation gives, word for word."""
    tokenizer, right = load_tokenizer(MODEL), 0
    model.eval()
    for first in range(0, len(rows), 64):
        some = rows[first : first + 64]
        prompts = [f"{row['prompt']}\n" for row in some]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        inputs.pop("token_type_ids", None)
        generate: Any = model.generate
        found = generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(text.strip() == row["response"].strip() for text, row in zip(texts, some, strict=True))
    return right / len(rows)


def fit(experiment: Experiment, ids: list[int], rate: float, mask: dict[str, Tensor] | None) -> PreTrainedModel:
    """The base model after three epochs on these rows, all weights or those of a mask, as `dualsft fit` trains them."""
    data, model = experiment.data(), load_model(MODEL, "float32")
    compact = CompactParameters(model, mask)
    optimizer = AdamW(compact.parameters(), lr=rate, weight_decay=0.0)
    compact.write_back_after(optimizer)
    compact.attach()
    loader = data.training_loader(ids, experiment.seed)
    for epoch in range(EPOCHS):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        model.train()
        for batch in loader:
            example_losses(model, batch).mean().backward()
            optimizer.step()
    compact.detach()
    return model.eval()


def fit_figures(experiment: Experiment, model: PreTrainedModel) -> dict[str, float]:
    """What a model does on held-out rows of the target and of the general tasks."""
    data = experiment.data()
    return {
        "validation loss": mean_loss(model, data.validation_loader()),
        "target exact match": exact_match(model, experiment.rows("test_target")),
        "general exact match": exact_match(model, experiment.rows("test_general")),
    }


# Stages

Figures = dict[str, float]
Stage = Callable[[Experiment], Iterator[tuple[str, Callable[[], Figures]]]]
"""Yields what is to be computed: a name, and how."""


def scores(experiment: Experiment) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """Every score on the pool."""
    for name, options in SCORES.items():
        yield name, partial(ranked, experiment, name, options)


def ranked(experiment: Experiment, name: str, options: dict[str, Any]) -> Figures:
    """A selection's figures."""
    return score_figures(experiment, experiment.select(name, options))


def fitted(experiment: Experiment, ids: list[int]) -> Figures:
    """The figures of all weights trained on these rows."""
    return fit_figures(experiment, fit(experiment, ids, RATE, None))


def fitted_on_choice(experiment: Experiment, name: str, options: dict[str, Any]) -> Figures:
    """The figures of all weights trained on what a selection chose."""
    return fitted(experiment, experiment.select(name, options).example_ids)


def fits(experiment: Experiment) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """All weights trained on what each score chose, on the clean rows, on as many random ones, and on everything."""
    sources = [row["source"] for row in experiment.rows("train")]
    clean = [i for i, source in enumerate(sources) if source == TARGET][: len(sources) // 10]
    drawn = torch.randperm(len(sources), generator=torch.Generator().manual_seed(experiment.seed))

    yield "base model", lambda: fit_figures(experiment, load_model(MODEL, "float32"))
    yield "the clean rows", partial(fitted, experiment, clean)
    yield "random rows", partial(fitted, experiment, sorted(drawn[: len(sources) // 10].tolist()))
    for name, options in SCORES.items():
        yield name, partial(fitted_on_choice, experiment, name, options)


def masks(experiment: Experiment) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """The clean rows trained under each mask, each at its best learning rate of a few, by the validation loss."""
    sources = [row["source"] for row in experiment.rows("train")]
    clean = [i for i, source in enumerate(sources) if source == TARGET]
    for share in SHARES:
        for name, rule in MASKS.items():

            def best(rule: Any = rule, share: float = share) -> Figures:
                mask = rule(experiment, share)
                models = {rate: fit(experiment, clean, rate, mask) for rate in MASK_RATES}
                found = {rate: fit_figures(experiment, model) for rate, model in models.items()}
                rate = min(found, key=lambda r: found[r]["validation loss"])
                return {**found[rate], "learning rate": rate}

            yield f"{share:.0%} by {name}", best


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
    """|φ_j| at the scoring checkpoint, today's default."""
    found = experiment.select("first order", SCORES["first order"]).parameter_scores()
    return top({name: score.abs() for name, score in found.items()}, share)


def along(columns: Any, signed: bool) -> Callable[[Experiment, float], dict[str, Tensor]]:
    """Columns along the path to the target, by their size or by what is gained alone."""

    def rule(experiment: Experiment, share: float) -> dict[str, Tensor]:
        options = {"path": PathSettings(along=TargetPath(), learning_rate=RATE, columns=columns, tolerance=1.0)}
        found = experiment.select(f"columns {columns}", options).parameter_scores()
        return top(found if signed else {name: score.abs() for name, score in found.items()}, share)

    return rule


def guarded(experiment: Experiment, share: float) -> dict[str, Tensor]:
    """The target's columns less the general rows' along the same path, each as a share of its sum."""
    both = {c: along_scores(experiment, c) for c in ("target", "pool")}
    sizes = {c: sum(float(s.abs().sum()) for s in of.values()) for c, of in both.items()}
    value = {n: both["target"][n].abs() / sizes["target"] - both["pool"][n].abs() / sizes["pool"] for n in both["pool"]}
    return top(value, share)


def along_scores(experiment: Experiment, columns: Any) -> dict[str, Tensor]:
    """The columns of a kind along the path to the target."""
    options = {"path": PathSettings(along=TargetPath(), learning_rate=RATE, columns=columns, tolerance=1.0)}
    return experiment.select(f"columns {columns}", options).parameter_scores()


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
    "random": random_weights,
}
STAGES: dict[str, Stage] = {"scores": scores, "fits": fits, "masks": masks}


def main() -> None:
    """Compute what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pools", nargs="*", default=None, help="Which pools; all by default.")
    parser.add_argument("--stages", nargs="*", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--methods", nargs="*", default=None, help="Which scores or masks; all by default.")
    parser.add_argument("--size", type=int, default=2560, help="Rows of a pool.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=None, help="Folder with the rows of the pool gsm8k.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/paths"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = options.pools or [*(["gsm8k"] if options.data else []), *SPOILERS]
    for kind in kinds:
        for stage in options.stages:
            found: dict[str, list[Figures]] = {}
            for seed in range(options.seeds):
                experiment = Experiment(options.output_dir / f"{kind}-{options.size}-seed-{seed}", kind, seed)
                if not (experiment.folder / "train.jsonl").is_file():
                    make_pool(kind, options.size, seed, options.data).write(experiment.folder)
                for name, compute in STAGES[stage](experiment):
                    if options.methods is None or name in options.methods:
                        found.setdefault(name, []).append(kept(experiment.folder / f"{stage}.json", name, compute))
            print(f"\n{kind}, {stage}\n\n{table(found)}", flush=True)


def kept(path: Path, name: str, compute: Callable[[], Figures]) -> Figures:
    """The figures of this name in a file, computed if they are not there yet."""
    stored: dict[str, Figures] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if name not in stored:
        stored[name] = compute()
        path.write_text(json.dumps(stored, indent=1), encoding="utf-8")
        print(f"{path.parent.name} {path.stem} {name}: {stored[name]}", file=sys.stderr, flush=True)
    return stored[name]


def table(found: dict[str, list[Figures]]) -> str:
    """Means with 95% intervals, one line a method."""
    names = list(dict.fromkeys(name for runs in found.values() for run in runs for name in run))
    lines = [f"| | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for method, runs in found.items():
        cells = [interval([run[name] for run in runs]) if name in runs[0] else "" for name in names]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t for the two-sided 95% interval of a mean over so many runs."""


def interval(values: list[float]) -> str:
    """The mean, and the half width of its 95% interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {T_95.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values)):.3f}"


if __name__ == "__main__":
    main()
