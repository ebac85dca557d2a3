"""Runs select or fit on a few batches, and notes what each phase held and how fast it was.

`dualsft plan --probe` starts it as a process: ``python -m dualsft.commands.probe_worker select REPORT OPTIONS``.
"""

import gc
import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from dualsft.cli import main
from dualsft.commands.fit import FitCLI
from dualsft.commands.select import SelectCLI
from dualsft.data.options import TRAIN
from dualsft.data.sampled import SampledDataModule, Tokens
from dualsft.models.loading import empty_model
from dualsft.plans.probe import PhaseSeen, Seen
from dualsft.runs.bar import Bar
from dualsft.runs.bars import recorded
from dualsft.runs.progress import peak_memory, reset_peak_memory
from dualsft.selection import load_selection
from dualsft.sharding.collectives import is_rank_zero


class _SelectProbe(SelectCLI):
    """Select from a few batches."""

    data_class = SampledDataModule

    def peaks(self, folder: Path) -> dict[str, int]:
        """Phase -> its peak in bytes."""
        return {phase.name: phase.peak_memory_bytes for phase in load_selection(folder).about.phases}


class _FitProbe(FitCLI):
    """Fine-tune on a few batches."""

    data_class = SampledDataModule

    def peaks(self, folder: Path) -> dict[str, int]:
        """Phase -> its peak in bytes."""
        return {"training": json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["peak_memory_bytes"]}


def probe(arguments: Sequence[str]) -> None:
    """Run a verb on the options that follow it and the report's path, and write the report."""
    verb, report, *options = arguments
    job: Any = (_SelectProbe if verb == "select" else _FitProbe)(options)
    began = time.monotonic()
    job.datamodule.setup("fit" if verb == "fit" else None)
    read = time.monotonic()
    empty_model(job.model.model_name_or_path)  # loads the model's code, which is no part of what the run holds
    before = _held(job.trainer.strategy.root_device)
    with recorded() as bars:
        job.run()
    if not is_rank_zero():
        return
    peaks = job.peaks(Path(job.folder.path))
    spans = [bar.span for bar in bars]
    seen = Seen(
        phases=[_seen(bar, peaks, before) for bar in bars],
        tokens=_by_side(job.datamodule.tokens()),
        reading=read - began,
        apart=time.monotonic() - read - _covered(spans),
    )
    Path(report).write_text(seen.as_json(), encoding="utf-8")


def _held(device: torch.device) -> int:
    """What the process holds before a model is there: on an accelerator nothing that counts."""
    gc.collect()
    if device.type != "cpu":
        return 0
    reset_peak_memory(device)
    return peak_memory(device)


def _seen(bar: Bar, peaks: dict[str, int], before: int) -> PhaseSeen:
    name = re.sub(r"^\[.*?\] ", "", bar.title)
    peak = peaks[name] - before if name in peaks else None
    start, end = bar.span
    return PhaseSeen(name, peak, bar.done / bar.rate if bar.rate else end - start, bar.done)


def _by_side(tokens: dict[str, Tokens]) -> dict[str, tuple[int, int]]:
    """The tokens of the pool, and those of all validation sets together."""
    sets = [of for key, of in tokens.items() if key != TRAIN]
    return {"pool": tokens[TRAIN], "validation": (sum(of.sample for of in sets), sum(of.whole for of in sets))}


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of spans."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return sum(end - start for start, end in merged)


if __name__ == "__main__":
    main(probe)
