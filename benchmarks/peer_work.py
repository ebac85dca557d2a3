"""The work that `benchmarks/peers.py` gives each tool: the same model, rows and tokens, in the form that each reads."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualsft import InstructionDataModule
from dualsft.data.examples import Examples
from dualsft.quickstart import MODEL, RECORDS

Tokens = list[dict[str, list[int]]]
"""Examples as ``input_ids`` and ``labels``; -100 where a token is not supervised."""


@dataclass(frozen=True)
class Work:
    """What is to be scored.

    Attributes:
        folder: Has ``pool``, ``validation`` and ``held_out``, each as records (``*.jsonl``) and as tokens
            (``*_tokens.jsonl``), the responses alone supervised.
        model: An ordinary Hugging Face folder.
    """

    folder: Path
    model: Path

    def records(self, name: str) -> Path:
        """A file of records."""
        return self.folder / f"{name}.jsonl"

    def token_file(self, name: str) -> Path:
        """The file of the same rows' tokens."""
        return self.folder / f"{name}_tokens.jsonl"

    def tokens(self, name: str) -> Tokens:
        """The tokens of a file of records."""
        return [json.loads(line) for line in self.token_file(name).read_text(encoding="utf-8").splitlines()]


def write_work(folder: Path, rows: int) -> Work:
    """The first so many rows of the quick start's pool, its validation rows and its held-out rows of the target."""
    folder.mkdir(parents=True, exist_ok=True)
    work = Work(folder, MODEL)
    for name, source in (("pool", "pool"), ("validation", "validation"), ("held_out", "test_target")):
        lines = (RECORDS / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()
        kept = lines[:rows] if name == "pool" else lines
        work.records(name).write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    sets = {name: str(work.records(name)) for name in ("validation", "held_out")}
    data = InstructionDataModule(str(work.records("pool")), sets, str(MODEL), max_length=256)
    for name, examples in {"pool": data.train_examples, **data.validation_sets}.items():
        _write_tokens(work.token_file(name), examples)
    return work


def _write_tokens(path: Path, examples: Examples) -> None:
    rows = [{key: [int(i) for i in row[key]] for key in ("input_ids", "labels")} for row in examples.dataset]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def roomy_copy(model: Path, folder: Path, positions: int) -> Path:
    """A copy of a model that says it has this many positions, which rotary embeddings do not mind."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        said = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**said, key: positions}, indent=2), encoding="utf-8")
    return folder


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """The JSON value of a file, made and written if there is none, so that a second start goes on after a stop."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make(), indent=2), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))
