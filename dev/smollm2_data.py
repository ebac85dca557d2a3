"""Write the rows on which SmolLM2 is compared: `python -m dev.smollm2_data [OUTPUT_DIR]`.

Of the data that the quick start ships: the pool is an eighth short maths problems, an eighth such problems with the
answer of another one, and general instructions. Short rows alone, as a token of this model costs two CPU cores some
10 ms.
"""

import argparse
from pathlib import Path
from random import Random

from dev.quickstart.make_data import DATA, Row, read_jsonl, write_jsonl

MAX_CHARS = 300
CLEAN, WRONG, GENERAL = 32, 32, 192
VALIDATION, TEST_TARGET, TEST_GENERAL = 32, 64, 64


def short_problems(rng: Random) -> list[Row]:
    """GSM8K's short problems among the shipped rows, in random order, each once."""
    files = ("gsm8k_pretrain", "pool", "validation", "test_target")
    rows = [row for name in files for row in read_jsonl(DATA / f"{name}.jsonl") if row.get("source") == "target"]
    found = list({row["prompt"]: row for row in rows if len(row["prompt"] + row["response"]) <= MAX_CHARS}.values())
    rng.shuffle(found)
    return found


def with_answers_of_others(rows: list[Row]) -> list[Row]:
    """The problems, each with the answer of the next one."""
    following = rows[1:] + rows[:1]
    return [
        row | {"source": "wrong", "response": other["response"]} for row, other in zip(rows, following, strict=True)
    ]


def main() -> None:
    """Write the four files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, nargs="?", default=Path("runs/smollm2/data"))
    output_dir: Path = parser.parse_args().output_dir
    rng = Random(0)
    problems = iter(short_problems(rng))
    clean, wrong, validation, test = (
        [next(problems) for _ in range(count)] for count in (CLEAN, WRONG, VALIDATION, TEST_TARGET)
    )
    general = [row for row in read_jsonl(DATA / "pool.jsonl") if row["source"] == "general"]
    pool = clean + with_answers_of_others(wrong) + rng.sample(general, GENERAL)
    rng.shuffle(pool)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_jsonl(output_dir / "pool.jsonl", pool)
    write_jsonl(output_dir / "validation.jsonl", validation)
    write_jsonl(output_dir / "test_target.jsonl", test)
    write_jsonl(output_dir / "test_general.jsonl", read_jsonl(DATA / "test_general.jsonl")[:TEST_GENERAL])


if __name__ == "__main__":
    main()
