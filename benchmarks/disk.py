"""What lies in the output folder while a selection is made, in bytes per weight, each time that a file is complete.

    python benchmarks/disk.py                              warm-up, Adam's preconditioner and the prior, in bfloat16
    python benchmarks/disk.py --dtype float32
    python benchmarks/disk.py --save_minutes 1e-9          the states of phases under way too, at every batch

A few rows and the embedded model of 3 million weights; files below a twentieth of a byte per weight are left out. A
file with two names counts once.
"""

import argparse
import contextlib
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import dualsft
from dualsft import InstructionDataModule, SelectionModule
from dualsft.models.loading import parameter_shapes
from dualsft.selection import Warmup
from dualsft.selection.prior import Prior
from dualsft.trainer import Trainer

MODEL = str(Path(dualsft.__file__).parent / "quickstart" / "assets" / "model")
LEAST = 0.05


def write_rows(path: Path, first: int, count: int) -> str:
    """Sums, as questions and answers."""
    rows = [{"prompt": f"What is {i} plus 3?", "response": f"It is {i + 3}."} for i in range(first, first + count)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def lying(folder: Path) -> dict[int, tuple[str, int]]:
    """The files of a folder: inode -> name and bytes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            about = path.stat()
            found[about.st_ino] = str(path.relative_to(folder)), about.st_size
    return found


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[list[dict[int, tuple[str, int]]]]:
    """What lies in a folder whenever the system is asked to sync a file, which is complete then."""
    seen: list[dict[int, tuple[str, int]]] = []

    def look(_: int) -> None:
        seen.append(lying(folder))

    with mock.patch.object(os, "fsync", look):
        yield seen


def select(folder: Path, options: argparse.Namespace) -> None:
    """A selection of everything that the paper's release does."""
    data = InstructionDataModule(
        train=write_rows(folder / "pool.jsonl", 0, 16),
        validation=write_rows(folder / "validation.jsonl", 50, 4),
        tokenizer=MODEL,
        max_length=64,
        batch_size=4,
        batch_tokens=100,
    )
    prior = Prior(weight=0.2, fraction=0.5)
    module = SelectionModule(
        MODEL, warmup=Warmup(fraction=0.5), prior=prior, dtype=options.dtype, save_minutes=options.save_minutes
    )
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **quiet)
    trainer.select(module, data, str(folder / "out"))


def main() -> None:
    """Print what lies there, where that is another thing than before, and the peak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--save_minutes", type=float, default=10.0)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as name,
        contextlib.redirect_stdout(io.StringIO()),
        watched(Path(name) / "out") as seen,
    ):
        select(Path(name), options)
    count, shown = sum(math.prod(shape) for shape in parameter_shapes(MODEL).values()), ""
    for files in seen:
        large = {name: size / count for name, size in files.values() if size / count >= LEAST}
        parts = ", ".join(f"{name} {size:.2f}" for name, size in large.items())
        if large and parts != shown:
            print(f"{sum(size for _, size in files.values()) / count:6.2f}  {parts}")
            shown = parts
    print(f"peak: {max(sum(size for _, size in files.values()) for files in seen) / count:.2f} bytes per weight")


if __name__ == "__main__":
    main()
