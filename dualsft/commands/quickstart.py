"""`dualsft quickstart`: the whole job on the embedded model and data, measured on held-out rows.

Selects, fine-tunes what was selected, and does the same by the paper's first-order scores, at random and with
everything. Every step is an ordinary dualsft command, printed before it runs; two run at a time, as ones so small gain
little from a second core.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dualsft.commands.keys import check_options
from dualsft.commands.steps import Steps
from dualsft.data.records import read_records
from dualsft.errors import UserError
from dualsft.quickstart import ASSETS, CONFIG, GENERAL, RECORDS
from dualsft.quickstart.control import write_control
from dualsft.quickstart.table import Answer, Row, side_by_side, table
from dualsft.runs.folder import RunFolder
from dualsft.selection import load_selection
from dualsft.storage.writing import write_atomically

BASE, FULL, RANDOM, FIRST_ORDER, DUAL = "base model", "everything", "random", "first order", "dual selection"
FIRST_ORDER_OPTIONS = ("--model.path.along", "null", "--model.scorer", "first_order", "--model.preconditioner", "adam")
FULL_OPTIONS = ("--trainer.max_epochs", "1", "--optimizer.lr", "1.0e-3")
"""One epoch over everything has about as many steps as the others; all weights take a lower rate than few."""
_SECONDS = {"select": 27.0, "select by first order": 16.0, "fit": 25.0, "validate": 5.0, "report": 6.0}
"""About what each command takes, on one core; only their ratios count, for how much is done."""
_SHOWN = 3
_LARGEST_SEED = 2**32 - 1  # numpy's
_LOGS, _REPORT, _BY_FIRST_ORDER = "logs", "report", "first-order-selection"
_WRITTEN = (_REPORT, _BY_FIRST_ORDER)
"""What lies in the folder beside results that other commands write under the same names."""


def quickstart_command(arguments: Sequence[str]) -> None:
    """Run the quick start."""
    own = parser()
    check_options(own, "dualsft quickstart", arguments)
    options = own.parse_args(arguments)
    folder = RunFolder(options.output_dir, overwrite=options.overwrite, resumable=False, written=_WRITTEN)
    folder.claim({"command": "quickstart"})
    start = time.perf_counter()
    try:
        rows = QuickStart(folder.path, options.seed).rows()
    except KeyboardInterrupt as stop:
        raise UserError("The quick start was interrupted; run it again with --overwrite.") from stop
    write_atomically(folder.path / "config.yaml", CONFIG.read_text(encoding="utf-8"))
    write_atomically(folder.path / "metrics.json", json.dumps([vars(row) for row in rows], indent=2))
    folder.finish()
    print(f"\nHeld-out prompts, before and after:\n\n{side_by_side(answers(folder.path))}\n\n{table(rows)}\n")
    page = folder.path / _REPORT / "report.html"
    print(f"{time.perf_counter() - start:.0f} s; open {page} in a browser to see what was chosen, and why")


def parser() -> argparse.ArgumentParser:
    """The parser of the quick start's few options."""
    parser = argparse.ArgumentParser("dualsft quickstart", description=__doc__)
    parser.add_argument("--output_dir", default="runs/quickstart", help="folder for the results (default: %(default)s)")
    parser.add_argument("--seed", type=_seed, default=0, help="seed of every step (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier quick start")
    return parser


def _seed(text: str) -> int:
    """A seed that every step takes: refused before the folder is claimed."""
    if not text.isdecimal() or int(text) > _LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; give a whole number from 0 to {_LARGEST_SEED}")
    return int(text)


class Verbs:
    """Commands on one configuration with one seed, each of which writes into a folder of its own.

    Args:
        steps: Runs them.
        folder: Where these are.
        config: The configuration.
        data: The folder of its pool and validation set.
        seed: Of every step.
    """

    def __init__(self, steps: Steps, folder: Path, config: Path, data: Path, seed: int) -> None:
        self.folder, self.pool = folder, data / "pool.jsonl"
        self._steps, self._config, self._validation, self._seed = steps, config, data / "validation.jsonl", seed

    def select(self, name: str, *options: str) -> tuple[Path, float]:
        """Select; return the selection's folder, and the seconds it took."""
        kind = "select by first order" if name == _BY_FIRST_ORDER else "select"
        return self.folder / name, self._run("select", name, _SECONDS[kind], *options)

    def fit(self, name: str, selection: Path | None, *options: str) -> tuple[Path, float]:
        """Fine-tune what a selection chose, or everything; return the model's folder, and the seconds it took."""
        output = f"fit-{name.replace(' ', '-')}"
        chosen = ["--model.selection", selection] if selection else []
        seconds = self._run("fit", output, _SECONDS["fit"], *chosen, *options)
        return self.folder / output / "model", seconds

    def measure(self, name: str, model: Path, **sets: Path) -> dict[str, float]:
        """The metrics of a model on held-out rows, by name and set."""
        output = f"eval-{name.replace(' ', '-')}"
        held_out = [part for kind, path in sets.items() for part in (f"--data.validation.{kind}", path)]
        self._run("validate", output, _SECONDS["validate"], "--model.model_name_or_path", model, *held_out)
        return json.loads((self.folder / output / "metrics.json").read_text(encoding="utf-8"))

    def report(self, *shown: Path) -> None:
        """Show what was chosen and trained as a page."""
        command = ["report", *shown, "--output_dir", self.folder / _REPORT]
        self._steps.run(_REPORT, command, _SECONDS["report"])

    def _run(self, verb: str, output: str, expected: float, *arguments: object) -> float:
        places = {
            "--model.model_name_or_path": ASSETS / "model",
            "--data.train": self.pool,
            "--data.validation": self._validation,
            "--seed_everything": self._seed,
        }
        if verb == "validate":
            del places["--data.train"], places["--data.validation"]
        missing = [part for option, value in places.items() if option not in arguments for part in (option, value)]
        command = [verb, "--config", self._config, *missing, *arguments, "--output_dir", self.folder / output]
        return self._steps.run(output, command, expected)


@dataclass(frozen=True)
class Tried:
    """A model that was trained, and measured.

    Attributes:
        metrics: Of the model, by name and set.
        selection: What it was trained on, if not on everything.
        seconds: What it took to choose and to train.
    """

    metrics: dict[str, float]
    selection: Path | None
    seconds: float


class QuickStart:
    """The steps of the quick start, all with one seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed

    def rows(self) -> list[Row]:
        """Run every step, two at a time; return one row of figures for each model."""
        total = sum(_SECONDS.values()) + 3 * _SECONDS["fit"] + 4 * _SECONDS["validate"]
        with Steps(self._folder / _LOGS, "the whole quick start", total, parallel=2) as steps:
            self._verbs = Verbs(steps, self._folder, CONFIG, RECORDS, self._seed)
            parts = steps.beside(self._along_the_path, self._at_one_checkpoint)
            tried = {name: one for part in parts for name, one in part.items()}
            fits = sorted(self._folder.glob("fit-*"))
            self._verbs.report(self._folder / "selection", self._folder / _BY_FIRST_ORDER, *fits)
        base_loss = tried[BASE].metrics["loss/general"]
        return [self._row(name, tried[name], base_loss) for name in (BASE, FULL, RANDOM, FIRST_ORDER, DUAL)]

    def _along_the_path(self) -> dict[str, Tried]:
        """What the path chooses, and as much at random; before these the base model."""
        base = Tried(self._measured(BASE, ASSETS / "model"), None, 0.0)
        chosen, seconds = self._verbs.select("selection")
        dual = self._fitted(DUAL, chosen, seconds)
        control = self._folder / "random-selection"
        write_control(
            load_selection(chosen), self._verbs.pool, control, self._seed, examples="random", weights="random"
        )
        return {BASE: base, DUAL: dual, RANDOM: self._fitted(RANDOM, control, 0.0)}

    def _at_one_checkpoint(self) -> dict[str, Tried]:
        """What the first-order scores choose; before that everything."""
        full = self._fitted(FULL, None, 0.0, *FULL_OPTIONS)
        chosen, seconds = self._verbs.select(_BY_FIRST_ORDER, *FIRST_ORDER_OPTIONS)
        return {FULL: full, FIRST_ORDER: self._fitted(FIRST_ORDER, chosen, seconds)}

    def _fitted(self, name: str, selection: Path | None, seconds: float, *options: str) -> Tried:
        """Train what a selection chose in some time, or everything, and measure the result."""
        model, trained = self._verbs.fit(name, selection, *options)
        return Tried(self._measured(name, model), selection, seconds + trained)

    def _measured(self, name: str, model: Path) -> dict[str, float]:
        return self._verbs.measure(name, model, target=RECORDS / "test_target.jsonl", general=GENERAL)

    def _row(self, name: str, tried: Tried, base_loss: float) -> Row:
        return Row(
            name=name,
            target=tried.metrics["exact_match/target"],
            general=tried.metrics["exact_match/general"],
            forgetting=tried.metrics["loss/general"] - base_loss,
            seconds=tried.seconds,
            **_shares(self._verbs.pool, tried.selection, trained=name != BASE),
        )


def answers(folder: Path) -> list[Answer]:
    """What was answered to the first few rows of the target before and after."""

    def predictions(name: str) -> list[dict[str, Any]]:
        text = (folder / f"eval-{name.replace(' ', '-')}" / "predictions.jsonl").read_text(encoding="utf-8")
        return [row for row in map(json.loads, text.splitlines()) if row["set"] == "target"]

    rows = [row["prompt"] for row in islice(read_records(str(RECORDS / "test_target.jsonl")), _SHOWN)]
    pairs = zip(rows, predictions(BASE), predictions(DUAL), strict=False)
    return [Answer(prompt, old["reference"], old["generation"], new["generation"]) for prompt, old, new in pairs]


def _shares(pool: Path, selection: Path | None, trained: bool) -> dict[str, Any]:
    """The shares of examples and weights that were trained, and the share of clean target data in these examples."""
    if not trained:
        return {"examples": 0.0, "weights": 0.0, "clean": None}
    if selection is None:
        return {"examples": 1.0, "weights": 1.0, "clean": _clean(list(read_records(str(pool))))}
    chosen = load_selection(selection)
    examples, weights = chosen.about.counts.examples, chosen.about.counts.parameters
    return {
        "examples": examples.selected / examples.rows,
        "weights": weights.selected / weights.scored,
        "clean": _clean(chosen.records),
    }


def _clean(records: Sequence[Any]) -> float:
    return sum(record["source"] == "target" for record in records) / len(records)
