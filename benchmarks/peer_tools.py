"""The tools and settings that `benchmarks/peers.py` compares: the command of each, and where it leaves its scores.

bergson is run by its own command line on a configuration file, in an environment of its own; dualsft by `dualsft
select`. Both get the same tokens. What a setting does not name is the tool's default.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peer_work import Work
from safetensors import safe_open
from torch import Tensor

from dualsft.quickstart import CONFIG
from dualsft.selection import load_selection

Reduction = Literal["mean", "sum"]
Steps = list[dict[str, Any]]
"""The steps of a configuration file of bergson."""
MiB = 1 << 20
PROJECTION = 16
"""The projection_dim of the example in bergson's README, and of its trackstar by default."""


@dataclass(frozen=True)
class Setting:
    """A tool with its options.

    Attributes:
        name: As the tables call it.
        command: What to run on some work, writing into a folder.
        scores: Reads the scores from that folder, high for what helps the target.
        covered: Reads from it which parameters' gradients are in the scores; None if it does not tell.
        reduction: Whether an example's loss is the mean or the sum over its supervised tokens.
        is_product: Whether the scores are meant to be products of gradients, as they are or projected.
    """

    name: str
    command: Callable[[Work, Path], list[str]]
    scores: Callable[[Path], Tensor]
    covered: Callable[[Path], list[str]] | None
    reduction: Reduction = "mean"
    is_product: bool = True


@dataclass(frozen=True)
class Cost:
    """What one run of a setting took.

    Attributes:
        wall: Seconds of the command, start and loading included.
        cpu: Seconds that it had a processor, of which other work takes none away.
        memory: Peak resident set of its largest process, bytes.
        disk: What it leaves in its folder, bytes.
        error: The last line it printed if it failed.
    """

    wall: float
    cpu: float
    memory: int
    disk: int
    error: str = ""


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def run(setting: Setting, work: Work, folder: Path) -> dict[str, Any]:
    """Run a setting into an empty folder; return its cost."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command, log = setting.command(work, folder), folder.with_suffix(".log")
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    error = log.read_text(encoding="utf-8").strip().splitlines()[-1] if process.returncode else ""
    return asdict(Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, disk, error))


def dualsft(name: str, *options: str) -> Setting:
    """`dualsft select` on the quick start's configuration with other options; no weights are chosen."""

    def command(work: Work, folder: Path) -> list[str]:
        model, pool, validation = str(work.model), str(work.records("pool")), str(work.records("validation"))
        data = ["--model.model_name_or_path", model, "--data.train", pool, "--data.validation", validation]
        settings = ["--model.parameter_budget", "null", *options, "--output_dir", str(folder / "selection")]
        return [sys.executable, "-m", "dualsft", "select", "--config", str(CONFIG), *data, *settings, "--quiet"]

    def scores(folder: Path) -> Tensor:
        return torch.tensor(load_selection(folder / "selection").examples["score"].to_pylist(), dtype=torch.float64)

    def covered(folder: Path) -> list[str]:
        with safe_open(folder / "selection" / "parameter_scores.safetensors", "pt") as stored:
            return list(stored.keys())

    return Setting(name, command, scores, covered)


def bergson(
    python: Path,
    name: str,
    steps: Callable[[Work, Path], Steps],
    read: Callable[[Path], Tensor],
    **about: Any,
) -> Setting:
    """`bergson` on a configuration of these steps."""

    def command(work: Work, folder: Path) -> list[str]:
        config = folder.with_suffix(".yaml")  # JSON is YAML too
        text = json.dumps({"run_path": str(folder), "steps": steps(work, folder)}, indent=2)
        config.write_text(text, encoding="utf-8")
        return [str(python), "-m", "bergson", str(config)]

    return Setting(name, command, read, about.pop("covered", modules_of_query), **about)


def index(work: Work, data: str, run_path: Path, **options: Any) -> dict[str, Any]:
    """The part of a step that says which rows of which model; 512 tokens a batch is the most it takes of this model."""
    dataset = {"dataset": str(work.token_file(data))}
    return {"run_path": str(run_path), "model": str(work.model), "data": dataset, "token_batch_size": 512, **options}


def query(work: Work) -> dict[str, Any]:
    """The validation rows as a query: the mean of their gradients."""
    return {"dataset": str(work.token_file("validation")), "aggregation": "mean"}


def products(work: Work, folder: Path, **options: Any) -> Steps:
    """The mean gradient of the validation rows, then each row's product with it."""
    asked = folder / "query"
    validation, pool = (index(work, data, folder / at, **options) for data, at in _PLACES)
    return [
        {"build": {"index_cfg": validation, "preprocess_cfg": {"aggregation": "mean"}}},
        {"score": {"index_cfg": pool, "score_cfg": {"query_path": str(asked)}, "preprocess_cfg": {}}},
    ]


_PLACES = (("validation", "query"), ("pool", "scores"))


def store(work: Work, folder: Path, **options: Any) -> Steps:
    """The mean gradient of the validation rows, and a store of each row's gradient."""
    first, _ = products(work, folder, **options)
    return [first, {"build": {"index_cfg": index(work, "pool", folder / "store", **options), "preprocess_cfg": {}}}]


def ekfac(work: Work, folder: Path) -> Steps:
    """The pipeline of influence functions with EK-FAC."""
    hessian = {"method": "kfac", "ev_correction": True}
    parts = {"hessian_cfg": hessian, "score_cfg": {}, "preprocess_cfg": {}}
    return [{"ekfac": {"index_cfg": index(work, "pool", folder), **parts, **_pipeline(work)}}]


def _pipeline(work: Work) -> dict[str, Any]:
    return {"hessian_pipeline_cfg": {"query": query(work)}}


def trackstar(work: Work, folder: Path) -> Steps:
    """The pipeline of TrackStar, at its own projection."""
    projected = index(work, "pool", folder, projection_dim=PROJECTION)
    return [{"trackstar": {"index_cfg": projected, "trackstar_cfg": {"query": query(work)}}}]


def magic(work: Work, folder: Path, steps: int, batch: int, rate: float) -> Steps:
    """Back through a training of one pass, with the loss, steps and AdamW of the retraining."""
    rows = len(work.tokens("pool"))
    training = {
        "batch_size": batch,
        "num_epochs": max(1, steps * batch // rows),
        "lr_schedule": {"lr": rate, "lr_scheduler_type": "constant"},
        "loss_reduction": "sum_of_means",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "weight_decay": 0.0,
        "wandb_project": "",
    }
    places = {"run_path": str(folder), "model": str(work.model), "overwrite": True, "query": query(work)}
    return [{"magic": {**places, "data": {"dataset": str(work.token_file("pool"))}, **training}}]


def written_scores(folder: Path) -> Tensor:
    """The scores of a folder ``scores`` of bergson."""
    info = json.loads((folder / "scores" / "info.json").read_text(encoding="utf-8"))
    layout = np.dtype(info["dtype"])
    table = np.fromfile(folder / "scores" / "scores.bin", layout)
    return torch.from_numpy(table["score_0"].astype(np.float64))


def lowered_scores(folder: Path) -> Tensor:
    """The same of a tool whose scores are low for what helps."""
    return -written_scores(folder)


def stored_products(folder: Path) -> Tensor:
    """Each stored gradient's product with the query's."""
    asked, held = (_gradients(folder / name) for name in ("query", "store"))
    return held @ asked[0]


def _gradients(folder: Path) -> Tensor:
    info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    flat = np.fromfile(folder / "gradients.bin", info["base_dtype"]).reshape(info["num_grads"], -1)
    return torch.from_numpy(flat.astype(np.float64))


def modules_of_query(folder: Path) -> list[str]:
    """The parameters whose gradients bergson's query has: the weights of the modules it names, without biases."""
    info = json.loads((folder / "query" / "info.json").read_text(encoding="utf-8"))
    return [f"model.{module}.weight" for module in info["grad_sizes"]]


def versions(python: Path, names: list[str]) -> dict[str, str]:
    """The versions of packages in an environment."""
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
