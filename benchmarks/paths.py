"""Which scores find the rows worth training on, and which weights: paths beside scores at one checkpoint, over seeds.

    python benchmarks/paths.py --seeds 5 --output_dir runs/paths                    every pool, every score, every fit
    python benchmarks/paths.py --pools wrong clean --seeds 5 --stages scores --output_dir runs/paths
    python benchmarks/paths.py --data DIR ...          the pool gsm8k too: GSM8K among general instructions, from DIR

Six stages, whose figures are kept in the output folder, so that a second start repeats nothing: `scores` ranks each
pool by each score; `fits` trains all weights on each chosen tenth of the rows, and `tenths` the tenth of the weights
that the same selection chose, `slow_fits` and `slow_tenths` at lower rates; `masks` trains the clean rows under each
rule for weights. Masks are trained at several learning rates, and the one that is best on the validation set counts.
Prints means over the seeds, 95% intervals.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from path_methods import MASKS, MODEL, RATE, SCORES, Experiment
from path_pools import make_pool
from torch import Tensor
from torch.optim import AdamW

from dev.quickstart.records import GENERAL, SPOILERS, SPOILT, TARGET
from dualsft.data.layout import Batch
from dualsft.data.tokenizer import load_tokenizer
from dualsft.errors import UserError
from dualsft.models import PreTrainedModel
from dualsft.models.loading import load_model
from dualsft.objectives import example_losses
from dualsft.selection import Selection
from dualsft.training.compact import CompactParameters

HELD_OUT = ("validation", "test_target", "test_general")
STEPS = 96
"""Steps of each fit: three epochs on a tenth of 2,560 rows, in batches of eight."""
MASK_RATES = (1e-3, 3e-3, 1e-2)
SLOW_MASK_RATES = (3e-5, 1e-4, 3e-4)
SLOW_RATE = 3e-5
"""Of 3e-5, 1e-4 and 3e-4 the best for the maths problems of the pool gsm8k, by the validation loss of one seed."""
SHARES = (0.01, 0.05, 0.1)
BASE, _LOSS = "base model", "test_target loss"

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
    """The base model after `STEPS` steps on these rows, all weights or those of a mask, as `dualsft fit` trains."""
    data, model = experiment.data(), load_model(MODEL, "float32")
    compact = CompactParameters(model, mask)
    optimizer = AdamW(compact.parameters(), lr=rate, weight_decay=0.0)
    compact.write_back_after(optimizer)
    compact.attach()
    loader = data.training_loader(ids, experiment.seed)
    for epoch in range(round(STEPS / len(loader))):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        model.train()
        for batch in loader:
            example_losses(model, batch).mean().backward()
            optimizer.step()
    compact.detach()
    return model.eval()


def fit_figures(experiment: Experiment, model: PreTrainedModel) -> dict[str, float]:
    """What a model does on held-out rows of the target and of the general tasks."""
    losses = {name: mean_loss(model, experiment.data(name).validation_loader()) for name in HELD_OUT}
    return {
        **{f"{name} loss": loss for name, loss in losses.items()},
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


def fits(experiment: Experiment, rate: float = RATE) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """All weights trained on what each score chose, on the clean rows, and on as many random ones."""
    sources = [row["source"] for row in experiment.rows("train")]
    clean = [i for i, source in enumerate(sources) if source == TARGET][: len(sources) // 10]
    drawn = torch.randperm(len(sources), generator=torch.Generator().manual_seed(experiment.seed))

    def fitted(ids: list[int]) -> Figures:
        return fit_figures(experiment, fit(experiment, ids, rate, None))

    def fitted_on_choice(name: str, options: dict[str, Any]) -> Figures:
        return fitted(experiment.select(name, options).example_ids)

    yield BASE, lambda: fit_figures(experiment, load_model(MODEL, "float32"))
    yield "the clean rows", partial(fitted, clean)
    yield "random rows", partial(fitted, sorted(drawn[: len(sources) // 10].tolist()))
    for name, options in SCORES.items():
        yield name, partial(fitted_on_choice, name, options)


def tenths(experiment: Experiment, rates: Sequence[float] = MASK_RATES) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """Both halves of each selection: its weights trained on its examples."""
    yield BASE, lambda: fit_figures(experiment, load_model(MODEL, "float32"))
    for name, options in SCORES.items():

        def both(name: str = name, options: dict[str, Any] = options) -> Figures:
            if "parameter_budget" in options:
                name, options = f"{name} and weights", {k: v for k, v in options.items() if k != "parameter_budget"}
            selection = experiment.select(name, options)
            return best_rate(experiment, selection.example_ids, selection.mask(), rates)

        yield name, both


def best_rate(
    experiment: Experiment, ids: list[int], mask: dict[str, Tensor], rates: Sequence[float] = MASK_RATES
) -> Figures:
    """The figures of a mask trained on these rows at its best learning rate of a few, by the validation loss."""
    models = {rate: fit(experiment, ids, rate, mask) for rate in rates}
    losses = {rate: mean_loss(model, experiment.data().validation_loader()) for rate, model in models.items()}
    rate = min(losses, key=lambda r: losses[r])
    return {**fit_figures(experiment, models[rate]), "learning rate": rate}


def masks(experiment: Experiment) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """The clean rows trained under each mask."""
    sources = [row["source"] for row in experiment.rows("train")]
    clean = [i for i, source in enumerate(sources) if source == TARGET]
    for share in SHARES:
        for name, rule in MASKS.items():

            def trained(rule: Any = rule, share: float = share) -> Figures:
                return best_rate(experiment, clean, rule(experiment, share))

            yield f"{share:.0%} by {name}", trained


STAGES: dict[str, Stage] = {
    "scores": scores,
    "fits": fits,
    "slow_fits": partial(fits, rate=SLOW_RATE),
    "tenths": tenths,
    "slow_tenths": partial(tenths, rates=SLOW_MASK_RATES),
    "masks": masks,
}


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
            print(f"\n{kind}, {stage}\n\n{table(with_changes(found))}", flush=True)


def kept(path: Path, name: str, compute: Callable[[], Figures]) -> Figures:
    """The figures of this name in a file, computed if they are not there yet; none of a path that teaches nothing."""
    stored: dict[str, Figures] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if name not in stored:
        try:
            stored[name] = compute()
        except UserError as error:
            if "does not lower the loss" not in str(error):
                raise
            print(error, file=sys.stderr)
            stored[name] = {}
        path.write_text(json.dumps(stored, indent=1), encoding="utf-8")
        print(f"{path.parent.name} {path.stem} {name}: {stored[name]}", file=sys.stderr, flush=True)
    return stored[name]


def with_changes(found: dict[str, list[Figures]]) -> dict[str, list[Figures]]:
    """The figures with the change of the target's loss that each fit has brought, seed by seed: pools differ by it."""
    if BASE not in found:
        return found
    before = [run[_LOSS] for run in found[BASE]]
    return {
        method: [
            {**run, f"change of {_LOSS}": run[_LOSS] - of} if run else run for run, of in zip(runs, before, strict=True)
        ]
        for method, runs in found.items()
    }


def table(found: dict[str, list[Figures]]) -> str:
    """Means with 95% intervals, one line a method."""
    names = list(dict.fromkeys(name for runs in found.values() for run in runs for name in run))
    lines = [f"| | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for method, runs in found.items():
        done = [run for run in runs if run]
        refused = f" (refused {len(runs) - len(done)} of {len(runs)})" if len(done) < len(runs) else ""
        cells = [interval([run[name] for run in done]) if done and name in done[0] else "" for name in names]
        lines.append(f"| {method}{refused} | {' | '.join(cells)} |")
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
