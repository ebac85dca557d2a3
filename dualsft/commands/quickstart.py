"""`dualsft quickstart`: the whole job on the embedded model and data, measured on held-out rows.

Selects, fine-tunes what was selected, and does the same by the paper's first-order scores, at random and with
everything. Every step is an ordinary dualsft command, printed before it runs.
"""

import argparse
import json
import shlex
import time
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any

from dualsft.cli import run
from dualsft.commands.keys import check_options
from dualsft.data.records import read_records
from dualsft.errors import UserError
from dualsft.quickstart import ASSETS, CONFIG, GENERAL, RECORDS
from dualsft.quickstart.control import write_control
from dualsft.quickstart.table import Answer, Row, side_by_side, table
from dualsft.runs.bars import bar
from dualsft.runs.folder import RunFolder
from dualsft.selection import load_selection
from dualsft.storage.writing import write_atomically

BASE, FULL, RANDOM, FIRST_ORDER, DUAL = "base model", "everything", "random", "first order", "dual selection"
FIRST_ORDER_OPTIONS = ("--model.path.along", "null", "--model.scorer", "first_order", "--model.preconditioner", "adam")
FULL_OPTIONS = ("--trainer.max_epochs", "1", "--optimizer.lr", "1.0e-3")
"""One epoch over everything has about as many steps as the others; all weights take a lower rate than few."""
_SECONDS = {"select": 17.0, "select by first order": 9.0, "fit": 20.0, "validate": 2.5, "report": 6.0}
"""About what each command takes, on two cores; only their ratios count, for how much is done."""
_SHOWN = 3
_LARGEST_SEED = 2**32 - 1  # numpy's
_LOG, _REPORT, _BY_FIRST_ORDER = "log.txt", "report", "first-order-selection"
_WRITTEN = (_LOG, _REPORT, _BY_FIRST_ORDER)
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
        folder: Where these are.
        config: The configuration.
        data: The folder of its pool and validation set.
        seed: Of every step.
    """

    def __init__(self, folder: Path, config: Path, data: Path, seed: int) -> None:
        self.folder, self.pool = folder, data / "pool.jsonl"
        self._config, self._validation, self._seed = config, data / "validation.jsonl", seed

    def select(self, name: str, *options: str) -> Path:
        """Select; return the selection's folder."""
        self._run("select", *options, "--output_dir", self.folder / name)
        return self.folder / name

    def fit(self, name: str, selection: Path | None, *options: str) -> Path:
        """Fine-tune what a selection chose, or everything; return the model's folder."""
        output = self.folder / f"fit-{name.replace(' ', '-')}"
        chosen = ["--model.selection", selection] if selection else []
        self._run("fit", *chosen, *options, "--output_dir", output)
        return output / "model"

    def measure(self, name: str, model: Path, **sets: Path) -> dict[str, float]:
        """The metrics of a model on held-out rows, by name and set."""
        output = self.folder / f"eval-{name.replace(' ', '-')}"
        held_out = [part for kind, path in sets.items() for part in (f"--data.validation.{kind}", path)]
        self._run("validate", "--model.model_name_or_path", model, *held_out, "--output_dir", output)
        return json.loads((output / "metrics.json").read_text(encoding="utf-8"))

    def _run(self, verb: str, *arguments: object) -> None:
        places = {
            "--model.model_name_or_path": ASSETS / "model",
            "--data.train": self.pool,
            "--data.validation": self._validation,
            "--seed_everything": self._seed,
        }
        if verb == "validate":
            del places["--data.train"], places["--data.validation"]
        missing = [part for option, value in places.items() if option not in arguments for part in (option, value)]
        command([verb, "--config", self._config, *missing, *arguments], self.folder / _LOG)


def command(arguments: Iterable[object], log: Path) -> None:
    """Print a command and run it; its own words go to a file."""
    given = [str(argument) for argument in arguments]
    print(f"$ dualsft {shlex.join(given)}", flush=True)
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file):
        run(given)


class QuickStart:
    """The steps of the quick start, all with one seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._verbs, self._seed = Verbs(folder, CONFIG, RECORDS, seed), seed

    def rows(self) -> list[Row]:
        """Run every step; return one row of figures for each model."""
        total = sum(_SECONDS.values()) + 3 * _SECONDS["fit"] + 4 * _SECONDS["validate"]
        with bar("the whole quick start", total) as self._bar:
            base = self._measured(BASE, ASSETS / "model")
            self._base_loss = base["loss/general"]
            chosen, chose = self._timed("select", lambda: self._verbs.select("selection"))
            simple, chose_simply = self._timed(
                "select by first order", lambda: self._verbs.select(_BY_FIRST_ORDER, *FIRST_ORDER_OPTIONS)
            )
            control = self._verbs.folder / "random-selection"
            write_control(
                load_selection(chosen), self._verbs.pool, control, self._seed, examples="random", weights="random"
            )
            rows = [
                self._row(BASE, base, None, 0.0, trained=False),
                self._fitted(FULL, None, 0.0, *FULL_OPTIONS),
                self._fitted(RANDOM, control, 0.0),
                self._fitted(FIRST_ORDER, simple, chose_simply),
                self._fitted(DUAL, chosen, chose),
            ]
            self._timed("report", self._report)
        return rows

    def _fitted(self, name: str, selection: Path | None, seconds: float, *options: str) -> Row:
        """Train what a selection chose in some time, or everything, and measure the result."""
        model, trained = self._timed("fit", lambda: self._verbs.fit(name, selection, *options))
        return self._row(name, self._measured(name, model), selection, seconds + trained, trained=True)

    def _measured(self, name: str, model: Path) -> dict[str, float]:
        sets = {"target": RECORDS / "test_target.jsonl", "general": GENERAL}
        return self._timed("validate", lambda: self._verbs.measure(name, model, **sets))[0]

    def _row(
        self, name: str, metrics: dict[str, float], selection: Path | None, seconds: float, *, trained: bool
    ) -> Row:
        return Row(
            name=name,
            target=metrics["exact_match/target"],
            general=metrics["exact_match/general"],
            forgetting=metrics["loss/general"] - self._base_loss,
            seconds=seconds,
            **_shares(self._verbs.pool, selection, trained),
        )

    def _report(self) -> None:
        of = self._verbs.folder
        shown = [of / "selection", of / _BY_FIRST_ORDER, *sorted(of.glob("fit-*"))]
        command(["report", *shown, "--output_dir", of / _REPORT], of / _LOG)

    def _timed(self, kind: str, step: Any) -> tuple[Any, float]:
        """(what a step returns, the seconds it took), and move the bar on."""
        start = time.perf_counter()
        found = step()
        self._bar.advance(_SECONDS[kind])
        return found, time.perf_counter() - start


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
