"""The pools of `benchmarks/paths.py`: the target among general rows, with a tenth of the rows spoilt in some way."""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from dev.quickstart import tasks
from dev.quickstart.records import GENERAL, TARGET, Row, record_pool


@dataclass(frozen=True)
class Pool:
    """The records of one experiment.

    Attributes:
        train: What examples are chosen from; ``source`` says what each is.
        validation: The target's.
        test_target: Held-out rows of the target.
        test_general: Held-out general rows.
    """

    train: list[Row]
    validation: list[Row]
    test_target: list[Row]
    test_general: list[Row]

    def write(self, folder: Path) -> None:
        """Write each part as a file of JSON lines."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in vars(self).items():
            (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def make_pool(kind: str, size: int, seed: int, data: Path | None = None) -> Pool:
    """A pool of this size: a tenth is the target, and a tenth is spoilt, but for the pool ``clean``.

    Args:
        kind: One of `SPOILERS`, or ``gsm8k`` for maths problems among general instructions.
        size: Rows of the pool.
        seed: Decides every draw.
        data: Folder with the rows of ``gsm8k``.
    """
    if kind == "gsm8k":
        assert data is not None
        return _gsm8k(size, seed, data)
    rows = record_pool(kind, size, seed)
    general = _plain(tasks.generate("test", 64, 20260502))
    return Pool(_plain(rows["pool"]), rows["validation"], rows["test_target"], general)


def _plain(rows: list[Row]) -> list[Row]:
    return [{key: row[key] for key in ("source", "prompt", "response") if key in row} for row in rows]


def _gsm8k(size: int, seed: int, data: Path) -> Pool:
    """Six maths problems to ten general instructions, none of them spoilt."""

    def read(name: str, prompt: str, response: str, source: str) -> list[Row]:
        lines = (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        found = [{"source": source, "prompt": r[prompt], "response": r[response]} for r in records]
        return Random(seed).sample(found, len(found))

    maths = read("gsm8k_train", "question", "answer", TARGET)
    held = read("gsm8k_validation", "question", "answer", TARGET)
    others = read("general_instructions", "prompt", "completion", GENERAL)
    count = size * 6 // 16
    train = [*maths[:count], *others[: size - count]]
    Random(seed).shuffle(train)
    return Pool(train, held[:64], held[64:128], _plain(tasks.generate("test", 64, 20260502)))
