"""The study behind docs/study.md: each side of the selection against random draws and against everything, over seeds.

    python benchmarks/study.py --seeds 5 --output_dir runs/study

Prints mean and standard deviation over the seeds of the losses on held-out rows, and how well the scores tell clean
target rows from others. The settings are those of configs/gsm8k.yaml; nothing is tuned per seed.
"""

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from dualsft.commands.quickstart import Verbs
from dualsft.commands.steps import Steps
from dualsft.quickstart import GENERAL, GSM8K, GSM8K_CONFIG, MODEL
from dualsft.quickstart.control import Draw, write_control
from dualsft.selection import Selection, load_selection

VARIANTS: dict[str, tuple[Draw, Draw]] = {
    "all examples, all weights": ("all", "all"),
    "chosen examples, chosen weights": ("chosen", "chosen"),
    "random examples, random weights": ("random", "random"),
    "chosen examples, all weights": ("chosen", "all"),
    "random examples, all weights": ("random", "all"),
    "all examples, chosen weights": ("all", "chosen"),
    "all examples, random weights": ("all", "random"),
}
POOL, HELD_OUT = GSM8K / "pool.jsonl", {"target": GSM8K / "test_target.jsonl", "general": GENERAL}
FIGURES = {"target_loss": "loss/target", "general_loss": "loss/general", "general_exact_match": "exact_match/general"}
"""A figure of the study -> the metric of `dualsft validate`."""
SECONDS = 250.0
"""About what a seed takes, on one core, as the quick start expects it of each command."""


def main() -> None:
    """Run every variant under every seed and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/study"))
    options = parser.parse_args()
    runs = [run_seed(options.output_dir / f"seed-{seed}", seed) for seed in range(options.seeds)]
    (options.output_dir / "study.json").write_text(json.dumps(runs, indent=2), encoding="utf-8")
    print(f"\n{fit_table([run['rows'] for run in runs])}\n\n{score_table([run['scores'] for run in runs])}")


def run_seed(folder: Path, seed: int) -> dict[str, Any]:
    """All variants under one seed, kept in the folder so that a second start does not repeat them."""
    kept = folder / "figures.json"
    if not kept.is_file():
        shutil.rmtree(folder, ignore_errors=True)  # of a seed that was cut short
        folder.mkdir(parents=True)
        with Steps(folder / "logs", f"seed {seed}", SECONDS, parallel=1) as steps:
            (figures,) = steps.beside(lambda: variants(Verbs(steps, folder, GSM8K_CONFIG, GSM8K, seed), seed))
        kept.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def variants(verbs: Verbs, seed: int) -> dict[str, Any]:
    """The figures of all variants under one seed."""
    selection = load_selection(verbs.select("selection")[0])
    rows = [measured(verbs, "base model", MODEL)]
    for name, (examples, weights) in VARIANTS.items():
        control = verbs.folder / f"control-{examples}-{weights}"
        write_control(selection, POOL, control, seed, examples=examples, weights=weights)
        rows.append(measured(verbs, name, verbs.fit(name, control)[0]))
    return {"rows": rows, "scores": score_quality(selection)}


def measured(verbs: Verbs, name: str, model: Path) -> dict[str, Any]:
    """The figures of a model."""
    metrics = verbs.measure(name.replace(",", ""), model, **HELD_OUT)
    return {"name": name, **{figure: metrics[metric] for figure, metric in FIGURES.items()}}


def score_quality(selection: Selection) -> dict[str, float]:
    """How well the example scores tell the pool's sources apart."""
    sources = [json.loads(line)["source"] for line in POOL.read_text(encoding="utf-8").splitlines()]
    by_source: dict[str, list[float]] = {}
    for source, score in zip(sources, selection.examples["score"].to_pylist(), strict=True):
        by_source.setdefault(source, []).append(score)
    chosen = [sources[i] for i in selection.example_ids]
    return {
        "clean target among the chosen": chosen.count("target") / len(chosen),
        "shuffled target among the chosen": chosen.count("shuffled") / len(chosen),
        "AUC, clean against shuffled": auc(by_source["target"], by_source["shuffled"]),
        "AUC, clean against general": auc(by_source["target"], by_source["general"]),
    }


def auc(positive: list[float], negative: list[float]) -> float:
    """The chance that a positive outranks a negative, ties counting half."""
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


def fit_table(runs: list[list[dict[str, float]]]) -> str:
    """Mean ± standard deviation over the seeds, one line a variant."""
    lines = ["| trained on | target loss | general loss | general exact match |", "| --- | ---: | ---: | ---: |"]
    for rows in zip(*runs, strict=True):
        cells = [spread([row[key] for row in rows]) for key in FIGURES]
        lines.append(f"| {rows[0]['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def score_table(runs: list[dict[str, float]]) -> str:
    """Mean ± standard deviation over the seeds, one line a figure."""
    lines = ["| scores | |", "| --- | ---: |"]
    return "\n".join([*lines, *(f"| {key} | {spread([run[key] for run in runs])} |" for key in runs[0])])


def spread(values: list[float]) -> str:
    """Mean ± sample standard deviation; just the value if there is one."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
