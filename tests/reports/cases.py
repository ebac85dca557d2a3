"""Directories of all kinds that a report is made of: a real tiny selection, and others as their commands write them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dualsft.commands import compare
from dualsft.experiments.audit_figures import draw_audit
from dualsft.experiments.judgement import AuditRun, judge
from dualsft.reports.selections.subject import Subject
from dualsft.reports.sources import Source
from dualsft.selection import Selection
from tests.experiments.cases import results
from tests.world.jobs import SGD, Inputs, select, write_inputs

SCRIPT = "<script>document.title = 'taken over'</script>"
"""A row with this in it is data."""
POOL: list[dict[str, str]] = [
    {
        "prompt": f"What is {k} + {k}?",
        "response": f"It is {2 * k}, of course." * (1 + k % 3),
        "source": f"source {k % 2}",
    }
    for k in range(24)
]
POOL[3]["response"] = SCRIPT
POOL[7]["prompt"] = "Wide & deep: 20 € für 'naïve' <b>日本語</b>?"


def write_selection_case(folder: Path, **options: Any) -> tuple[Inputs, Selection]:
    """A real selection of a tiny model from a pool of two sources, a quarter of it, with scores by token."""
    inputs = write_inputs(folder / "inputs", POOL, POOL[:2])
    usual = {**SGD, "token_scores": True, "data_budget": 6, "parameter_budget": 0.1}
    return inputs, select(inputs, folder / "selection", {**usual, **options})


def subject(selection: Selection) -> Subject:
    """A selection as the page looks at it."""
    return Subject(Source(selection.folder, selection.folder.name, "selection"), "file")


def write_fit(folder: Path, after: Mapping[str, float] | None = None, samples: Sequence[dict[str, Any]] = ()) -> Path:
    """A finished fit of two named validation sets, of which the second is forgotten."""
    base = {"loss": 2.0, "loss/target": 3.0, "loss/general": 1.0}
    metrics = {"loss": 1.9, "loss/target": 2.5, "loss/general": 1.3} if after is None else dict(after)
    figures = {
        "weights": {"trained": 10, "all": 100},
        "examples": {"each_epoch": 6, "passed": 12},
        "epochs": 2,
        "steps": 4,
        "exported_step": 4,
        "train_loss": {"batches": 2, "first": 3.0, "last": 2.0},
        "validation": {"base": base, "step": 4, "metrics": metrics or None},
        "tokens": 100,
        "seconds": 2.0,
        "tokens_per_second": 50.0,
        "peak_memory_bytes": 2**28,
    }
    logs = folder / "logs" / "version_0"
    logs.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(figures))
    (folder / "config.yaml").write_text("model: {model_name_or_path: base/model, selection: runs/selection}\n")
    rows = ["epoch,step,train_loss,val_loss,val_loss/target,val_loss/general"]
    rows += [f"{k // 2},{k},{3.0 - k / 4},,," for k in range(4)]
    rows += ["1,4,,1.9,2.5,1.3"] if metrics else []
    (logs / "metrics.csv").write_text("\n".join(rows) + "\n")
    (folder / "logs" / "samples.jsonl").write_text("".join(f"{json.dumps(sample)}\n" for sample in samples))
    return folder


def write_evaluation(folder: Path, model: str = "base/model", loss: float = 1.0, correct: Sequence[bool] = ()) -> Path:
    """An evaluation of a model, with its answers to prompts of one set if it is told which are correct."""
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"loss": loss, "exact_match": 0.5}))
    settings = {"model": {"model_name_or_path": model}, "data": {"validation": "data/general.jsonl"}}
    (folder / "config.yaml").write_text(json.dumps(settings))
    answers = [
        {"set": None, "example_id": k, "prompt": f"{k}? {SCRIPT}", "generation": f"{is_right}", "correct": is_right}
        for k, is_right in enumerate(correct)
    ]
    if answers:
        (folder / "predictions.jsonl").write_text("".join(f"{json.dumps(answer)}\n" for answer in answers))
    return folder


def sample(step: int, answer: str, **changes: Any) -> dict[str, Any]:
    """An answer at a step, to a prompt with markup in it."""
    usual = {"step": step, "epoch": 0, "set": "general", "example_id": 0, "prompt": f"Say {SCRIPT}"}
    return {**usual, "answer": answer, "reference": "yes", **changes}


def audit_runs() -> list[AuditRun]:
    """Runs of one side and scorer, in which the predicted order is the measured one."""
    families = [("chosen", "chosen"), *(("random", f"random {k}") for k in range(4)), ("band", "0"), ("band", "1")]
    gains = [0.5, 0.1, 0.2, 0.3, 0.4, 0.45, 0.05]
    return [
        AuditRun("data", family, label, "first_order", 4, 1e-3, gain, {0: gain}, {})
        for (family, label), gain in zip(families, gains, strict=True)
    ]


def write_audit(folder: Path) -> Path:
    """An audit with one failed run."""
    folder.mkdir()
    failures = [{"name": "random 9", "error": f"no memory {SCRIPT}"}]
    about = {"schema_version": 1, "selection": "runs/selection", "calibrated": True, "failures": failures}
    (folder / "audit.json").write_text(json.dumps({**about, **judge(audit_runs(), True)}))
    draw_audit(audit_runs(), True, folder / "figures")
    return folder


def write_comparison(folder: Path) -> Path:
    """A comparison of two methods, of which one has markup in its name."""
    folder.mkdir()
    compare.write(results({"both": [2.0, 2.1], SCRIPT: [2.5, 2.6]}), folder)
    return folder
