"""Build the data files of the quick start: `python -m dev.quickstart.make_data [--gsm8k_dir DIR]`.

With a folder that holds GSM8K's files (`train.jsonl` and `test.jsonl`, or `gsm8k_train.jsonl` and
`gsm8k_validation.jsonl`), the excerpts are drawn from it; without one, those already shipped are used again and only
the general rows are made anew. Both give the same files, byte for byte. Problems of more than 560 characters
(question and answer together) are left out, to keep the quick start quick: the rest have 170 tokens of the shipped
tokenizer on average and 284 at most.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from dev.quickstart.tasks import Row, generate

DATA = Path(__file__).parents[2] / "dualsft" / "quickstart" / "assets" / "data"
SEED = 20260501
TRAIN_ROWS, TEST_ROWS = 6000, 640  # how many rows, from the top of GSM8K's files, the excerpts are drawn from
MAX_CHARS = 560
PRETRAIN, TARGET, SHUFFLED, GENERAL, VALIDATION, TEST_TARGET, TEST_GENERAL = 600, 128, 128, 1024, 64, 192, 256

Parts = dict[str, list[Row]]


def read_jsonl(path: Path) -> list[Row]:
    """Read one JSON object per line."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def shuffle_words(text: str, rng: Random) -> str:
    """Permute the words of a text; spaces and line breaks stay where they are."""
    pieces = re.split(r"(\s+)", text)
    words = pieces[::2]
    while len(set(words)) > 1 and words == pieces[::2]:
        rng.shuffle(words)
    pieces[::2] = words
    return "".join(pieces)


def _read_gsm8k(folder: Path, names: tuple[str, str], limit: int, rng: Random) -> list[Row]:
    """Read the short problems of one GSM8K file, in random order."""
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"neither {names[0]} nor {names[1]} in {folder}")
    rows = [
        {"source": "target", "prompt": row["question"].strip(), "response": row["answer"].strip()}
        for row in read_jsonl(path)[:limit]
        if len(row["question"]) + len(row["answer"]) <= MAX_CHARS
    ]
    rows = list({row["prompt"]: row for row in rows}.values())
    rng.shuffle(rows)
    return rows


def draw_parts(folder: Path) -> Parts:
    """Draw the disjoint GSM8K parts from the original files."""
    rng = Random(SEED)
    train = _read_gsm8k(folder, ("train.jsonl", "gsm8k_train.jsonl"), TRAIN_ROWS, rng)
    test = _read_gsm8k(folder, ("test.jsonl", "gsm8k_validation.jsonl"), TEST_ROWS, rng)
    prompts = {row["prompt"] for row in train}
    test = [row for row in test if row["prompt"] not in prompts]
    parts: Parts = {"test_target": test[:TEST_TARGET]}
    start = 0
    for name, count in (("pretrain", PRETRAIN), ("target", TARGET), ("shuffled", SHUFFLED), ("validation", VALIDATION)):
        parts[name] = train[start : start + count]
        start += count
    parts["shuffled"] = [
        {**row, "source": "shuffled", "response": shuffle_words(row["response"], rng)} for row in parts["shuffled"]
    ]
    return parts


def shipped_parts(folder: Path = DATA) -> Parts:
    """Take the GSM8K parts out of the shipped files."""
    pool = read_jsonl(folder / "pool.jsonl")
    return {
        "pretrain": read_jsonl(folder / "gsm8k_pretrain.jsonl"),
        "target": [row for row in pool if row["source"] == "target"],
        "shuffled": [row for row in pool if row["source"] == "shuffled"],
        "validation": read_jsonl(folder / "validation.jsonl"),
        "test_target": read_jsonl(folder / "test_target.jsonl"),
    }


def write_files(parts: Parts, folder: Path) -> None:
    """Write the data files from the GSM8K parts and freshly generated general rows."""
    folder.mkdir(parents=True, exist_ok=True)
    pool = [*parts["target"], *parts["shuffled"], *generate("pool", GENERAL, SEED)]
    pool.sort(key=lambda row: row["prompt"])  # so that the order does not depend on where the parts came from
    Random(SEED).shuffle(pool)
    write_jsonl(folder / "gsm8k_pretrain.jsonl", parts["pretrain"])
    write_jsonl(folder / "pool.jsonl", pool)
    write_jsonl(folder / "validation.jsonl", parts["validation"])
    write_jsonl(folder / "test_target.jsonl", parts["test_target"])
    write_jsonl(folder / "test_general.jsonl", generate("test", TEST_GENERAL, SEED + 1))


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Build the data files of the quick start.")
    parser.add_argument("--gsm8k_dir", type=Path, help="folder with GSM8K's files; default: the shipped excerpts")
    parser.add_argument("--output_dir", type=Path, default=DATA, help="where to write; default: the package's assets")
    args = parser.parse_args(argv)
    write_files(draw_parts(args.gsm8k_dir) if args.gsm8k_dir else shipped_parts(), args.output_dir)


if __name__ == "__main__":
    main()
