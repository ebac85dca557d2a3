"""Does the jobs of an experiment, by the ordinary commands: what `dualsft.experiments.workers` runs as a process."""

import ctypes
import gc
import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from dualsft.cli import run
from dualsft.commands.experiment_jobs import CHECKPOINT, MODEL, SELECTION, TRAIN, VALIDATION
from dualsft.commands.fit import FitCLI
from dualsft.commands.messages import explanation
from dualsft.commands.resolved import put
from dualsft.errors import UserError
from dualsft.experiments.bank import Result, do, log_file, work_folder
from dualsft.experiments.jobs import Job
from dualsft.experiments.variants import make_variant
from dualsft.experiments.workers import serve
from dualsft.finetune import ExportModel
from dualsft.finetune.adapter import Adapter
from dualsft.finetune.export_adapter import ADAPTER, ExportAdapter
from dualsft.runs.progress import reset_peak_memory
from dualsft.selection import load_selection

_VERSIONS = ("dualsft", "torch", "transformers", "lightning")


def execute(job: Job, place: Path) -> Result:
    """Do a job in its folder, and return its result."""
    start = time.perf_counter()
    work = work_folder(place)
    work.mkdir(exist_ok=True)
    reset_peak_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # that of this job alone
    metrics: dict[str, dict[str, float]] = {}
    try:
        match job.kind:
            case "select":
                costs = _select(job, place)
            case "allocate":
                costs = _allocate(job, place)
            case "fit" | "adapter":
                costs = _fit(job, work)
                metrics = evaluate(job, str(work / "fit" / "model"), work)
            case "evaluate":
                metrics, costs = evaluate(job, job.inputs[MODEL], work), {}
            case _:
                raise UserError(f"A job of the kind {job.kind!r} is not done here.")
    finally:
        _free_memory()
    versions = {name: importlib.metadata.version(name) for name in _VERSIONS}
    return Result(metrics=metrics, costs=costs, seconds=time.perf_counter() - start, versions=versions)


def _select(job: Job, place: Path) -> dict[str, float]:
    """Make a selection; return its costs."""
    folder = place / "selection"
    command("select", job.settings["select"], _read(job), place / "select.yaml", folder)
    return _costs_of(folder)


def _allocate(job: Job, place: Path) -> dict[str, float]:
    """Choose anew from the scores of another job's selection; return its costs."""
    folder = place / "selection"
    read = {"selection": job.inputs[SELECTION], TRAIN: job.inputs[TRAIN]}
    command("allocate", job.settings["allocate"], read, place / "allocate.yaml", folder)
    return _costs_of(folder)


def _costs_of(folder: Path) -> dict[str, float]:
    """The costs of a selection."""
    made = load_selection(folder)
    return {
        "seconds": sum(phase.seconds for phase in made.about.phases),
        "peak_memory_bytes": max((phase.peak_memory_bytes for phase in made.about.phases), default=0),
        "bytes_on_disk": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "examples": made.about.counts.examples.selected,
        "trained_weights": made.about.counts.parameters.selected,
    }


def _fit(job: Job, work: Path) -> dict[str, float]:
    """Train what the job says; return its costs."""
    settings, read = job.settings["fit"], _read(job)
    if (variant := job.settings["variant"]) is not None:
        folder = work / "selection"
        if not (folder / "manifest.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            split = (settings.get("data") or {}).get("train_split") or "train"
            make_variant(job.inputs[SELECTION], variant, folder, job.inputs[TRAIN], split)
        read[SELECTION] = str(folder)
    if (adapter := job.settings.get("adapter")) is not None:
        fit_adapter(adapter, settings, read, work / "fit.yaml", work / "fit")
        trained = work / "fit" / ADAPTER / "adapter_model.safetensors"
    else:
        command("fit", settings, read, work / "fit.yaml", work / "fit")
        trained = work / "fit" / "delta.safetensors"
    figures = json.loads((work / "fit" / "metrics.json").read_text(encoding="utf-8"))
    return {
        "seconds": figures["seconds"],
        "peak_memory_bytes": figures["peak_memory_bytes"],
        "bytes_on_disk": trained.stat().st_size,
        "trained_weights": figures["weights"]["trained"],
        "examples": figures["examples"]["each_epoch"],
        "steps": figures["steps"],
    }


def evaluate(job: Job, model: str, work: Path) -> dict[str, dict[str, float]]:
    """Evaluate a model as the job says: evaluation -> metric -> value.

    Data sets whose settings are the same are evaluated together, as the model is loaded once for them.
    """
    groups: dict[str, list[str]] = {}
    for name, settings in job.settings["evaluations"].items():
        alone = f"evaluations.{name}" not in job.inputs  # tasks
        groups.setdefault(f"{name if alone else ''}{json.dumps(settings, sort_keys=True)}", []).append(name)
    found: dict[str, dict[str, float]] = {}
    for number, names in enumerate(groups.values()):
        settings = job.settings["evaluations"][names[0]]
        sources = {f"set{k}": job.inputs.get(f"evaluations.{name}") for k, name in enumerate(names)}
        read = {MODEL: model, VALIDATION: sources if all(sources.values()) else None}
        folder = work / f"evaluation-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        command("validate", settings, read, work / f"evaluation-{number}.yaml", folder)
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        found |= _by_set(metrics, names) if all(sources.values()) else {names[0]: metrics}
    return found


def _by_set(metrics: Mapping[str, float], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """The metrics of each named set; means over the sets have no name behind a slash."""
    of_sets: dict[str, dict[str, float]] = {name: {} for name in names}
    for key, value in metrics.items():
        metric, _, number = key.rpartition("/set")
        if metric:
            of_sets[names[int(number)]][metric] = value
    return of_sets


def _read(job: Job) -> dict[str, Any]:
    """What the job reads, by the keys of the configuration."""
    read: dict[str, Any] = {}
    for key, path in job.inputs.items():
        if key in (MODEL, TRAIN, VALIDATION, CHECKPOINT, SELECTION):
            read[key] = path
        elif key.startswith(f"{VALIDATION}."):
            read.setdefault(VALIDATION, {})[key.removeprefix(f"{VALIDATION}.")] = path
    return read


def command(verb: str, settings: Mapping[str, Any], read: Mapping[str, Any], file: Path, output: Path) -> None:
    """Run a verb on these settings, going on from what an earlier try left; the configuration stands in ``file``.

    A run on several devices gets a process of its own, as the launchers of ranks start the same command once more.
    """
    config = _write_config(settings, read, file)
    again = {"validate": [], "allocate": ["--overwrite"]}.get(verb, ["--resume"])
    arguments = [verb, "--config", str(file), *again, "--output_dir", str(output)]
    if _is_alone(config):
        alone(lambda: run(arguments))
        return
    done = subprocess.run([sys.executable, "-m", "dualsft", *arguments], stdin=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"dualsft {verb} ended with exit code {done.returncode}.")


def fit_adapter(
    adapter: Mapping[str, Any], settings: Mapping[str, Any], read: Mapping[str, Any], file: Path, output: Path
) -> None:
    """Train an adapter in place of weights, as `command` runs fit; see `dualsft.finetune.adapter`."""
    config = _write_config(settings, read, file)
    if not _is_alone(config):
        raise UserError("an adapter is trained on one device; set trainer.devices to 1.")

    def fit() -> None:
        job = FitCLI(["--config", str(file), "--resume", "--output_dir", str(output)])
        job.model.adapter = Adapter(adapter, int(config["seed_everything"]))
        callbacks = job.trainer.callbacks  # type: ignore[attr-defined]
        exporting = [ExportAdapter(output) if isinstance(c, ExportModel) else c for c in callbacks]
        job.trainer.callbacks = exporting  # type: ignore[attr-defined]
        job.run()

    alone(fit)


def alone(work: Callable[[], None]) -> None:
    """Do something that loads a model, and leave none of it in memory.

    jsonargparse keeps the last parser that it used in a context variable, and with it the model of the command.
    """
    try:
        copy_context().run(work)
    finally:
        _free_memory()


def _free_memory() -> None:
    """Give back to the system what is no longer used: models refer to themselves, and glibc keeps what was freed."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _write_config(settings: Mapping[str, Any], read: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Write the configuration of a verb, and return it."""
    config: dict[str, Any] = json.loads(json.dumps(settings))
    for key, value in read.items():
        put(config, key, value)
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return config


def _is_alone(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is for one process."""
    trainer = config.get("trainer") or {}
    return trainer.get("devices") in (1, "1", None) and trainer.get("num_nodes", 1) == 1


def explain(error: Exception) -> str:
    """One sentence for an exception; its traceback goes to the log."""
    told = explanation(error)
    if told is not None:
        return told[0].removeprefix("dualsft: error: ")
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    serve(partial(do, execute=execute, explain=explain), log_file)
