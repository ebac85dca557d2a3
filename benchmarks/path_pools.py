"""The pools of `benchmarks/paths.py`: the target among general rows, with a tenth of the rows spoilt in some way."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from dev.quickstart import tasks

Row = dict[str, str]
TARGET, SPOILT, GENERAL = "target", "spoilt", "general"


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


def _facts(rng: Random) -> tuple[dict[str, str], str]:
    """A sentence, and what it tells."""
    lists = {"who": tasks.NAMES, "did": tasks.ACTIONS, "item": tasks.OBJECTS, "where": tasks.PLACES, "day": tasks.DAYS}
    facts = {name: rng.choice(words) for name, words in lists.items()}
    forms = (
        "{who} {did} a {item} at the {where} on {day}.",
        "On {day}, {who} {did} a {item} at the {where}.",
        "At the {where}, {who} {did} a {item} on {day}.",
    )
    return facts, rng.choice(forms).format(**facts)


def _answer(facts: dict[str, str]) -> str:
    return f"who: {facts['who']}; what: {facts['item']}; where: {facts['where']}"


def _clean(rng: Random) -> tuple[str, str]:
    facts, sentence = _facts(rng)
    return f"Record: {sentence}", _answer(facts)


def _wrong(rng: Random) -> tuple[str, str]:
    """The target's form, with what another sentence tells."""
    return _clean(rng)[0], _clean(rng)[1]


def _shuffled(rng: Random) -> tuple[str, str]:
    prompt, answer = _clean(rng)
    words = answer.split()
    rng.shuffle(words)
    return prompt, " ".join(words)


def _other_template(rng: Random) -> tuple[str, str]:
    """The same sentences and facts in another form."""
    facts, sentence = _facts(rng)
    return f"Record: {sentence}", f"{facts['where']} | {facts['item']} | {facts['who']}"


SPOILERS: dict[str, Callable[[Random], tuple[str, str]] | None] = {
    "wrong": _wrong,
    "shuffled": _shuffled,
    "template": _other_template,
    "clean": None,
}


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
    rng, seen, spoil = Random(seed), set[str](), SPOILERS[kind]

    def rows(count: int, make: Callable[[Random], tuple[str, str]], source: str) -> list[Row]:
        found: list[Row] = []
        while len(found) < count:
            prompt, response = make(rng)
            if prompt not in seen:
                seen.add(prompt)
                found.append({"source": source, "prompt": prompt, "response": response})
        return found

    special = rows(size // 10, _clean, TARGET) + (rows(size // 10, spoil, SPOILT) if spoil else [])
    general = [{**row, "source": GENERAL} for row in tasks.generate("pool", size - len(special), 20260501 + seed)]
    train = [*special, *general]
    rng.shuffle(train)
    validation, test = rows(64, _clean, TARGET), rows(64, _clean, TARGET)
    return Pool(_plain(train), _plain(validation), _plain(test), _plain(tasks.generate("test", 64, 20260502)))


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
