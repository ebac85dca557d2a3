"""Peaks that `dualsft plan` predicts beside those of whole commands, as `dualsft plan --probe` runs them.

    python benchmarks/plan_commands.py                         two families, one and two ranks
    python benchmarks/plan_commands.py --families llama --ranks 1 --cases first_order

`benchmarks/plan.py` measures single passes; this one measures select and fit as they are run, with whatever their
loading, their checks, their files and their other phases leave in memory. Models have random weights; records are
random text, all of it supervised. What a process held before its model was loaded is not counted.
"""

import argparse
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from memory import STEADY
from path_methods import MODEL
from plan import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualsft.cli import run
from dualsft.commands.plan_job import make_job
from dualsft.commands.plan_probe import run_probe
from dualsft.plans.probe import kind_of, probe_options
from dualsft.plans.remedies import plan_job
from dualsft.runs.table import markdown_table

SELECTS: dict[str, dict[str, Any]] = {
    "first_order": {},
    "first_order, prior": {"prior": {"weight": 0.2}},
    "diagonal_fisher": {"scorer": "diagonal_fisher"},
    "hessian_vector": {"scorer": "hessian_vector", "warmup": {"fraction": 0.0}, "preconditioner": "none"},
    "along the target": {"path": {"along": "target", "epochs": 1, "pieces": 2, "most_pieces": 2, "held_out": 0.0}},
}
FITS: dict[str, dict[str, Any] | None] = {
    "fit, dense": None,
    "fit, masked": {"parameter_allocator": "global_top_k"},
    "fit, structured": {"parameter_allocator": "structured"},
    "fit, masked, training prior": {"parameter_allocator": "global_top_k"},
}
PRIOR = {"training_prior": {"weight": 0.3}}
TOKENS, ROWS, BATCH_TOKENS, BATCH = 128, 12, 512, 4


def write(folder: Path, family: str) -> dict[str, Any]:
    """Write a model with random weights and its data; return the configuration of both commands."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = FAMILIES[family](eos_token_id=2, bos_token_id=1, pad_token_id=0)
    for made in (AutoModelForCausalLM.from_config(config), tokenizer):
        made.save_pretrained(folder / "model")
    draw = random.Random(0)
    for name, rows in {"train": ROWS, "validation": ROWS}.items():
        texts = ({"text": " ".join(f"{draw.randrange(10**6)}" for _ in range(TOKENS))} for _ in range(rows))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    return {
        "model": {"model_name_or_path": str(folder / "model"), "dtype": "float32", "parameter_budget": 0.1},
        "data": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"),
            "max_length": TOKENS,
            "batch_tokens": BATCH_TOKENS,
            "batch_size": BATCH,
        },
        "trainer": {"accelerator": "cpu", "max_epochs": 1},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-5, "foreach": False}},
    }


def options(folder: Path, case: str, config: dict[str, Any], model: dict[str, Any], ranks: int) -> list[str]:
    """The command line of a case on so many ranks."""
    several = {"devices": ranks, "strategy": "fsdp2"} if ranks > 1 else {}
    config = {**config, "model": {**config["model"], **model}, "trainer": {**config["trainer"], **several}}
    path = folder / f"{case}-{ranks}.yaml".replace(" ", "-")
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["--config", str(path)]


def measured(case: str, family: str, ranks: int, verb: str, given: list[str]) -> Iterator[list[str]]:
    """A row for each phase of a command."""
    job = make_job(verb, given, 1.0, None, None, to_be_chosen=False)
    planned = {phase.name: phase.peak for phase in plan_job(job).phases}
    peaks: dict[str, int] = {}
    for phase in run_probe(verb, [*given, *probe_options(job)], None).phases:
        if phase.peak is not None and kind_of(phase) in planned:
            peaks[kind_of(phase)] = max(phase.peak, peaks.get(kind_of(phase), 0))
    for name, peak in peaks.items():
        mib = (f"{size / 2**20:,.0f}" for size in (planned[name], peak))
        yield [f"{case}: {name}", family, str(ranks), *mib, f"{planned[name] / peak:.2f}"]


def rows(family: str, ranks: int, cases: list[str]) -> Iterator[list[str]]:
    """The rows of one family on so many ranks."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        config = write(folder, family)
        for case in (case for case in SELECTS if case in cases):
            yield from measured(case, family, ranks, "select", options(folder, case, config, SELECTS[case], ranks))
        for case in (case for case in FITS if case in cases):
            model: dict[str, Any] = {}
            if (choice := FITS[case]) is not None:
                # all rows, as a batch of a fit has no more examples than were chosen
                cold = {**choice, "warmup": {"fraction": 0.0}, "preconditioner": "none", "data_budget": None}
                model = {"selection": str(folder / case.replace(" ", "-"))}
                run(
                    [
                        "select",
                        *options(folder, f"{case}-selection", config, cold, 1),
                        "--output_dir",
                        model["selection"],
                    ]
                )
            model |= PRIOR if case.endswith("prior") else {}
            yield from measured(case, family, ranks, "fit", options(folder, case, config, model, ranks))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", choices=FAMILIES, nargs="+", default=list(FAMILIES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cases", choices=[*SELECTS, *FITS], nargs="+", default=[*SELECTS, *FITS])
    given = parser.parse_args()
    os.environ.update(STEADY)  # for the processes of the probes
    found = [["command: phase", "model", "ranks", "planned, MiB", "measured, MiB", "ratio"]]
    for ranks in given.ranks:
        for family in given.families:
            found += rows(family, ranks, given.cases)
    print(markdown_table(found))


if __name__ == "__main__":
    main()
