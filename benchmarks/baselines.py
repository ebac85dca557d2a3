"""Choosing both sides against the baselines plugin: each of its rules for one side alone, and each two in sequence.

    python benchmarks/baselines.py --output_dir runs/baselines --dry_run      what would run
    python benchmarks/baselines.py --output_dir runs/baselines

Writes a pool of `benchmarks/paths.py` and the grid, then runs `dualsft compare` on them: more than 500 jobs, hours on
two CPU cores; what is done is kept, and a second start goes on. A tenth of the rows is the target, a tenth the target
with wrong answers, the rest general. Every run takes 96 steps. Needs the package dualsft-baselines. `hft` is not among
the rules, as it trains half of the weights; random examples before a rule for weights are the same for every seed.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from path_methods import MODEL
from path_pools import make_pool

STEPS, BATCH, CHOSEN = 96, 8, 0.1
RATE, MASK_RATE = 1e-3, 3e-3
"""Learning rate of all weights, of warm-ups and paths; and of a tenth of the weights, for which it is the one that is
most often the best on the validation set in `benchmarks/paths.py`."""

Settings = dict[str, Any]
PATH: Settings = {"model.path.along": "target", "model.path.learning_rate": RATE}
EXAMPLES: dict[str, Settings] = {
    "longest": {"model.data_allocator": "longest_response"},
    "gradient norm": {"model.data_allocator": "gradient_norm"},
    "loss": {"model.data_allocator": "loss"},
    "LESS": {"model.data_allocator": "less"},
    "LESS, 4 epochs": {"model.path.along": "less_checkpoints", "model.path.epochs": 4},
    "Train on Validation": {
        "model.path.along": "train_on_validation",
        "model.path.learning_rate": RATE,
        "model.path.held_out": 0.0,
        "model.warmup.fraction": 0.0,
    },
}
WEIGHTS: dict[str, Settings] = {
    "magnitude": {"model.parameter_allocator": "magnitude"},
    "LIFT": {"model.parameter_allocator": "lift"},
    "SIFT": {"model.scorer": "sift"},
}
RANDOM_EXAMPLES: Settings = {"model.data_allocator": "random_examples"}
RANDOM_WEIGHTS: Settings = {"model.parameter_allocator": "random_weights"}
OURS: dict[str, Settings] = {"first order": {}, "path": PATH}


def methods() -> dict[str, Settings]:
    """What is compared, as the grid takes it."""
    all_weights, same_steps = {"optimizer.lr": RATE}, {"trainer.max_epochs": -1, "trainer.max_steps": STEPS}
    found: dict[str, Settings] = {f"both: {name}": {"select": of} for name, of in OURS.items()}
    found |= {
        f"examples: {name}": {"select": {**of, "model.parameter_budget": None}, "fit": all_weights}
        for name, of in {**OURS, **EXAMPLES}.items()
    }
    found["examples: random"] = {"examples": "random", "weights": "all", "fit": all_weights}
    found["weights: random"] = {"examples": "all", "weights": "random", "fit": same_steps}
    found |= {
        f"weights: {name}": {"select": {**of, "model.data_budget": None}, "fit": same_steps}
        for name, of in {**OURS, **WEIGHTS}.items()
    }
    found |= {
        f"{name}, then {rule}": {"data": of, "parameters": how}
        for name, of in {**EXAMPLES, "random": RANDOM_EXAMPLES, "path": PATH}.items()
        for rule, how in {**WEIGHTS, "random": RANDOM_WEIGHTS}.items()
    }
    return {
        **found,
        "LoRA on the path's examples": {"select": PATH, "adapter": {"peft_type": "LORA"}},
        "everything": {"examples": "all", "weights": "all", "fit": {**same_steps, **all_weights}},
    }


def write(folder: Path, size: int, seeds: int) -> Path:
    """Write the pool, the configuration and the grid; return the grid's path."""
    pool = folder / "pool"
    make_pool("wrong", size, 0).write(pool)
    config = {
        "model": {
            "model_name_or_path": MODEL,
            "dtype": "float32",
            "data_budget": CHOSEN,
            "parameter_budget": CHOSEN,
            "warmup": {"fraction": 0.1, "learning_rate": RATE},
        },
        "data": {
            "train": str(pool / "train.jsonl"),
            "validation": str(pool / "validation.jsonl"),
            "max_length": 256,
            "batch_tokens": 4096,
            "batch_size": BATCH,
        },
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": MASK_RATE, "weight_decay": 0.0}},
        "trainer": {"accelerator": "cpu", "max_epochs": round(STEPS * BATCH / (CHOSEN * size))},
    }
    measured = {"metric": "exact_match", "max_new_tokens": 32}
    grid = {
        "config": ["config.yaml"],
        "methods": methods(),
        "budgets": [{"data": CHOSEN, "parameters": CHOSEN}],
        "seeds": list(range(seeds)),
        "evaluations": {
            "target": {"data": str(pool / "test_target.jsonl"), "group": "plasticity", **measured},
            "general": {"data": str(pool / "test_general.jsonl"), "group": "stability", "forgetting": True, **measured},
        },
    }
    for name, content in (("config", config), ("grid", grid)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return folder / "grid.yaml"


def main() -> None:
    """Write what the comparison takes, and run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=640, help="Rows of the pool.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--dry_run", action="store_true")
    options = parser.parse_args()
    folder = options.output_dir.resolve()
    command = [sys.executable, "-m", "dualsft", "compare", "--config", str(write(folder, options.size, options.seeds))]
    command += ["--output_dir", str(folder / "comparison"), *(["--dry_run"] if options.dry_run else [])]
    raise SystemExit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
