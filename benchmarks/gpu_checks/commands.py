"""The commands themselves on the embedded model: `select` and `fit` as a user runs them; strategies on one rank."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from dualsft.cli import run
from dualsft.quickstart import GSM8K, MODEL
from dualsft.selection import load_selection
from gpu_checks.models import timed
from gpu_checks.section import Figure, Scale

_PLAIN = ["--model.preconditioner", "none", "--model.warmup.fraction", "0"]
_TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "dualsft")


def commands(scale: Scale) -> Iterator[Figure]:
    """`select` in float32 and bfloat16, and `fit`; scores beside those of the CPU."""
    with TemporaryDirectory() as folder:
        place = Path(folder)
        options = _options(scale, place)
        seconds = timed(scale.device, lambda: run(["select", *_PLAIN, *options, "--output_dir", f"{place}/float32"]))
        yield Figure("select, float32", seconds, "s")
        reference = _scores(place / "float32")
        others = {"bfloat16": [*options, "--model.dtype", "bfloat16"]}
        if scale.cuda:
            others["on the CPU"] = [*options, "--trainer.accelerator", "cpu"]
        for name, given in others.items():
            run(["select", *_PLAIN, *given, "--output_dir", f"{place}/{name}"])
            found = float(spearman_corrcoef(_scores(place / name), reference))
            yield Figure(f"float32 and {name}: Spearman of the examples' scores", found)
        given = [*options, "--model.selection", f"{place}/float32", "--trainer.max_epochs", "1"]
        run_fit = ["fit", *given, "--output_dir", f"{place}/fit", "--model.samples.number", "0"]
        yield Figure("fit", timed(scale.device, lambda: run(run_fit)), "s")


def one_rank(scale: Scale) -> Iterator[Figure]:
    """`select` under torchrun with one process, by each strategy for several, beside the same without."""
    with TemporaryDirectory() as folder:
        place = Path(folder)
        options = _options(scale, place)
        run(["select", *_PLAIN, *options, "--output_dir", f"{place}/whole"])
        expected = _scores(place / "whole")
        for strategy in ("fsdp2", "ddp"):
            output = place / strategy
            given = [*options, "--trainer.strategy", strategy, "--output_dir", str(output)]
            command = [sys.executable, *_TORCHRUN, "select", *_PLAIN, *given]
            yield Figure(f"{strategy}: torchrun, one process", timed("cpu", partial(_succeed, command)), "s")
            apart = float(((_scores(output) - expected).abs() / expected.abs().max()).max())
            yield Figure(f"{strategy}: largest relative difference of a score", apart)


def _succeed(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])


def _options(scale: Scale, place: Path) -> list[str]:
    """Keys of a small job; the pool is cut to the examples that are scored."""
    for name, count in (("pool", scale.examples), ("validation", scale.examples // 4)):
        with (GSM8K / f"{name}.jsonl").open(encoding="utf-8") as lines:
            (place / f"{name}.jsonl").write_text("".join(islice(lines, count)), encoding="utf-8")
    keys = {
        "model.model_name_or_path": MODEL,
        "model.dtype": "float32",
        "data.train": place / "pool.jsonl",
        "data.validation": place / "validation.jsonl",
        "data.max_length": 512,
        "trainer.accelerator": "gpu" if scale.cuda else "cpu",
        "trainer.devices": 1,
        "trainer.enable_progress_bar": "false",
    }
    return [part for key, value in keys.items() for part in (f"--{key}", str(value))]


def _scores(folder: Path) -> Tensor:
    scores = load_selection(str(folder)).examples["score"].to_pylist()
    return torch.tensor([score for score in scores if score is not None], dtype=torch.float64)
