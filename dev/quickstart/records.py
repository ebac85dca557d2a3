"""Records extracted from sentences: a target that the base model of the quick start has never seen, and can learn.

    Record: Ivy found a key at the park on Monday.   ->   who: Ivy; what: key; where: park

Rows of a pool may be spoilt in one way: with what another sentence tells, with the answer's words shuffled, or with the
same facts in another form.

    python -m dev.quickstart.records        writes the quick start's pool, validation set and held-out rows
"""

from collections.abc import Callable
from pathlib import Path
from random import Random

from dev.quickstart import tasks
from dev.quickstart.make_data import write_jsonl

Row = dict[str, str]
Make = Callable[[Random], tuple[str, str]]
TARGET, SPOILT, GENERAL = "target", "spoilt", "general"
DATA = Path(__file__).parents[2] / "dualsft" / "quickstart" / "assets" / "records"
SEED, POOL, HELD_OUT = 20261129, 1280, 128


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


SPOILERS: dict[str, Make | None] = {
    "wrong": _wrong,
    "shuffled": _shuffled,
    "template": _other_template,
    "clean": None,
}


def record_pool(kind: str, size: int, seed: int, held_out: int = 64) -> dict[str, list[Row]]:
    """The rows of a pool, of a validation set of 64 rows, and of the target's held-out rows, by name.

    Args:
        kind: One of `SPOILERS`: how a tenth of the rows is spoilt.
        size: Rows of the pool, of which a tenth is the target, and the rest general.
        seed: Decides every draw.
        held_out: How many rows of the target are held out.
    """
    rng, seen, spoil = Random(seed), set[str](), SPOILERS[kind]

    def rows(count: int, make: Make, source: str) -> list[Row]:
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
    return {
        "pool": train,
        "validation": rows(64, _clean, TARGET),
        "test_target": rows(held_out, _clean, TARGET),
    }


def main(folder: Path = DATA) -> None:
    """Write the files of the quick start."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in record_pool("wrong", POOL, SEED, HELD_OUT).items():
        write_jsonl(folder / f"{name}.jsonl", rows)


if __name__ == "__main__":
    main()
