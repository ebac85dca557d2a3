"""Write the rows on which SmolLM2 is compared: `python -m dev.smollm2_data [OUTPUT_DIR]`, after `dev.get_smollm2`.

Of the data that the quick start ships: the pool is an eighth short maths problems, an eighth such problems with the
answer of another one, and general instructions. Short rows alone, as a token of this model costs two CPU cores some
10 ms. What the model knew, of which a fine-tune is to forget nothing, are its own answers to other general prompts,
written as conversations, so that they are read under the chat template under which it gave them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dev.quickstart.make_data import DATA, Row, read_jsonl, write_jsonl

MAX_CHARS = 300
CLEAN, WRONG, GENERAL = 32, 32, 192
VALIDATION, TEST_TARGET, TEST_GENERAL = 32, 32, 32
ANSWER_TOKENS = 32


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


@torch.no_grad()
def answered_by(model_dir: Path, rows: Sequence[Row], count: int) -> list[dict[str, Any]]:
    """The first rows that a model ends an answer to within `ANSWER_TOKENS`, each with that answer, decoded greedily."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    found: list[dict[str, Any]] = []
    for row in rows:
        asked = [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        said = model.generate(ids, max_new_tokens=ANSWER_TOKENS, do_sample=False)[0, ids.shape[1] :]
        answer = tokenizer.decode(said, skip_special_tokens=True).strip()
        if said[-1] == tokenizer.eos_token_id and answer:
            found.append({"messages": [*asked, {"role": "assistant", "content": answer}]})
        if len(found) == count:
            return found
    raise SystemExit(f"{model_dir} ends only {len(found)} answers within {ANSWER_TOKENS} tokens, not {count}")


def main() -> None:
    """Write the four files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, default=Path("runs/smollm2/model"), help="made by dev.get_smollm2")
    parser.add_argument("output_dir", type=Path, nargs="?", default=Path("runs/smollm2/data"))
    arguments = parser.parse_args()
    output_dir: Path = arguments.output_dir
    rng = Random(0)
    problems = iter(short_problems(rng))
    clean, wrong, validation, test = (
        [next(problems) for _ in range(count)] for count in (CLEAN, WRONG, VALIDATION, TEST_TARGET)
    )
    general = [row for row in read_jsonl(DATA / "pool.jsonl") if row["source"] == "general"]
    pool = clean + with_answers_of_others(wrong) + rng.sample(general, GENERAL)
    rng.shuffle(pool)
    known = answered_by(arguments.model_dir, read_jsonl(DATA / "test_general.jsonl"), TEST_GENERAL)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_jsonl(output_dir / "pool.jsonl", pool)
    write_jsonl(output_dir / "validation.jsonl", validation)
    write_jsonl(output_dir / "test_target.jsonl", test)
    write_jsonl(output_dir / "test_general.jsonl", known)


if __name__ == "__main__":
    main()
