"""`dualsft quickstart`: the whole job on the embedded model and data, measured on held-out rows.

Selects, fine-tunes what was selected, and fine-tunes two controls under the same settings: all weights on all examples,
and a random subset and mask of the same size. Every step is an ordinary dualsft command, printed before it runs.
"""

import argparse
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dualsft import quickstart
from dualsft.cli import run
from dualsft.commands.keys import check_options
from dualsft.data.records import read_records
from dualsft.errors import UserError
from dualsft.quickstart.control import write_control
from dualsft.quickstart.table import Row, table
from dualsft.runs.folder import RunFolder
from dualsft.selection import load_selection
from dualsft.storage.writing import write_atomically

HERE = Path(quickstart.__file__).parent
CONFIG, ASSETS = HERE / "config.yaml", HERE / "assets"
POOL = ASSETS / "data" / "pool.jsonl"
HELD_OUT = {"target": ASSETS / "data" / "test_target.jsonl", "general": ASSETS / "data" / "test_general.jsonl"}


def quickstart_command(arguments: Sequence[str]) -> None:
    """Run the quick start."""
    parser = argparse.ArgumentParser("dualsft quickstart", description=__doc__)
    parser.add_argument("--output_dir", default="runs/quickstart", help="folder for the results (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every step (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier quick start")
    check_options(parser, "dualsft quickstart", arguments)
    options = parser.parse_args(arguments)
    folder = RunFolder(options.output_dir, overwrite=options.overwrite, resumable=False)
    folder.claim({"command": "quickstart"})
    start = time.perf_counter()
    try:
        rows = QuickStart(folder.path, options.seed).rows()
    except KeyboardInterrupt as stop:
        raise UserError("The quick start was interrupted; run it again with --overwrite.") from stop
    write_atomically(folder.path / "config.yaml", CONFIG.read_text(encoding="utf-8"))
    write_atomically(folder.path / "metrics.json", json.dumps([vars(row) for row in rows], indent=2))
    folder.finish()
    print(f"\n{table(rows)}\n\n{time.perf_counter() - start:.0f} s; everything lies in {folder.path}")


class QuickStart:
    """The steps of the quick start, all with one seed; each writes into its own folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed

    def rows(self) -> list[Row]:
        """Run every step; return one row of figures per model."""
        chosen = self.select()
        control = self._folder / "random-selection"
        write_control(load_selection(chosen), POOL, control, self._seed, examples="random", weights="random")
        return [
            self.base(),
            self.fit("full fine-tune", None),
            self.fit("random subset and mask", control),
            self.fit("dual selection", chosen),
        ]

    def select(self) -> Path:
        """Select under the quick start's settings; return the selection directory."""
        self._run("select", "--output_dir", self._folder / "selection")
        return self._folder / "selection"

    def base(self) -> Row:
        """Measure the base model."""
        return self._measure("base model", ASSETS / "model", None, trained=False)

    def fit(self, name: str, selection: Path | None) -> Row:
        """Fine-tune what a selection chose, or everything, and measure the result."""
        output = self._folder / f"fit-{name.replace(' ', '-')}"
        chosen = ["--model.selection", selection] if selection else []
        self._run("fit", *chosen, "--output_dir", output)
        return self._measure(name, output / "model", selection, trained=True)

    def _measure(self, name: str, model: Path, selection: Path | None, trained: bool) -> Row:
        measured = {}
        for kind, data in HELD_OUT.items():
            output = self._folder / f"eval-{name.replace(' ', '-')}-{kind}"
            tokens = [] if kind == "general" else ["--model.generation.max_new_tokens", "0"]
            at = ["--model.model_name_or_path", model, "--data.validation", data]
            self._run("validate", *at, *tokens, "--output_dir", output)
            measured[kind] = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
        return Row(
            name=name,
            target_loss=measured["target"]["loss"],
            general_loss=measured["general"]["loss"],
            general_exact_match=measured["general"]["exact_match"],
            **_shares(selection, trained),
        )

    def _run(self, verb: str, *arguments: object) -> None:
        places = {
            "--model.model_name_or_path": ASSETS / "model",
            "--data.train": POOL,
            "--data.validation": ASSETS / "data" / "validation.jsonl",
            "--seed_everything": self._seed,
        }
        if verb == "validate":
            del places["--data.train"]
        missing = [part for option, value in places.items() if option not in arguments for part in (option, value)]
        given = [str(argument) for argument in (*arguments, *missing)]
        command = [verb, "--config", str(CONFIG), *given]
        print(f"\n$ dualsft {shlex.join(command)}", flush=True)
        run(command)


def _shares(selection: Path | None, trained: bool) -> dict[str, Any]:
    """The shares of examples and weights that were trained, and the share of clean target data in these examples."""
    if not trained:
        return {"examples": 0.0, "weights": 0.0, "clean_target": None}
    if selection is None:
        return {"examples": 1.0, "weights": 1.0, "clean_target": _clean(list(read_records(str(POOL))))}
    chosen = load_selection(selection)
    examples, weights = chosen.about.counts.examples, chosen.about.counts.parameters
    return {
        "examples": examples.selected / examples.rows,
        "weights": weights.selected / weights.scored,
        "clean_target": _clean(chosen.records),
    }


def _clean(records: Sequence[Mapping[str, Any]]) -> float:
    return sum(record["source"] == "target" for record in records) / len(records)
