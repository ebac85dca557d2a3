"""Host memory and time of a pool: as Python objects, as it was held before; in the cache; and found again there.

    python benchmarks/pools.py                      up to 100,000 short rows, about a minute of CPU
    python benchmarks/pools.py --rows 2000000       the full one
    python benchmarks/pools.py --cache_dir /scratch

Each size is read, encoded and cut into scoring batches in three ways, each in a process of its own:

    objects     a tuple of lines, the encoded examples in memory, statuses as texts, batches as lists
    cached      the lines' bytes in a file, the examples written to the cache and mapped, the rest in arrays
    found       the same, where another process has written the cache before

Then a tenth of the rows is chosen by random scores, with near-duplicates dropped, from the pool in the cache.

Memory is what the process holds in the end beyond what it held at the start, without what is mapped from files, which
the system drops when others need the room (Linux: RssAnon); of the choice it is the peak, as seen every 20 ms. Times
are microseconds per row of the process. What the three make is the same, or the program ends.
"""

import argparse
import gc
import json
import multiprocessing
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import dualsft
from dualsft.data import cache_folder
from dualsft.data.batches import length_batches
from dualsft.data.encoded import in_memory
from dualsft.data.encoding import encoded_chunks
from dualsft.data.examples import Examples, encode_examples
from dualsft.data.files import SourceLine
from dualsft.data.finding import find_source
from dualsft.data.options import FormatOptions
from dualsft.data.records import Records, build_records, read_records
from dualsft.data.supervision import STATUSES
from dualsft.data.tokenizer import load_tokenizer
from dualsft.matrix.example_values import ExampleValues
from dualsft.selection import Warmup
from dualsft.selection.data_choice import Pool, choose_data
from dualsft.selection.near_duplicates import NearDuplicates
from dualsft.selection.settings import SelectionSettings

MODEL = Path(dualsft.__file__).parent / "quickstart" / "assets" / "model"
MAX_LENGTH, BATCH_TOKENS = 512, 8192


class Objects:
    """Lines as Python objects, with the interface of `dualsft.data.lines.Lines`."""

    def __init__(self, lines: tuple[SourceLine, ...]) -> None:
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    def text(self, row: int) -> str:
        """The text of a line."""
        return self._lines[row].text

    def number(self, row: int) -> int:
        """The number of a line."""
        return self._lines[row].number


class Measured(NamedTuple):
    """What a way takes: bytes held, and seconds of reading, encoding and cutting; what it makes; and the choice."""

    held: int
    read: float
    encode: float
    cut: float
    made: Any
    peak: int
    choose: float


def objects(pool: str, cache: str, clock: Callable[[], None]) -> tuple[Any, Any]:
    """The pool as it was held before."""
    [file] = find_source(pool, "train").files
    lines: list[SourceLine] = []
    read = build_records(_kept(file.lines, lines))
    held: Any = Objects(tuple(lines))
    del lines
    records = Records(read.parts, read.fingerprint, held)
    del read
    clock()
    encoded = in_memory(encoded_chunks(records, load_tokenizer(str(MODEL)), FormatOptions(), MAX_LENGTH))
    status = tuple(STATUSES[k] for k in encoded.status)
    clock()
    ids = [i for i, of in enumerate(status) if of == "ok"]
    batches = list(length_batches(encoded.lengths, BATCH_TOKENS, ids=ids))
    clock()
    return (records, encoded, status, ids, batches), (encoded.dataset._fingerprint, hash(tuple(map(tuple, batches))))


def _kept(lines: Any, kept: list[SourceLine]) -> Any:
    for line in lines:
        kept.append(line)
        yield line


def cached(pool: str, cache: str, clock: Callable[[], None]) -> tuple[Any, Any]:
    """The pool through the cache."""
    records = read_records(pool, cache_dir=cache)
    clock()
    tokenizer = load_tokenizer(str(MODEL))
    examples = encode_examples(records, tokenizer, FormatOptions(), MAX_LENGTH, cache, processes=1)
    clock()
    batches = length_batches(examples.lengths, BATCH_TOKENS, ids=examples.is_ok().nonzero()[0])
    clock()
    return (examples, batches), (examples.dataset._fingerprint, lambda: hash(tuple(map(tuple, batches))))


WAYS: dict[str, Callable[..., Any]] = {"objects": objects, "cached": cached, "found": cached}


def measure(way: Callable[..., Any], pool: str, cache: str, choice: bool) -> Measured:
    """What a way takes in this process, and the choice if it is asked for."""
    marks = [time.process_time()]
    gc.collect()
    before = anonymous()
    held, (fingerprint, batches) = way(pool, cache, lambda: marks.append(time.process_time()))
    gc.collect()
    after = anonymous()
    read, encode, cut = (end - start for start, end in pairwise(marks))
    made = (fingerprint, batches() if callable(batches) else batches)
    chosen = choose(held[0]) if isinstance(held[0], Examples) and choice else (0, 0.0)
    return Measured(after - before, read, encode, cut, made, *chosen)


def choose(examples: Examples) -> tuple[int, float]:
    """The peak beyond what is held, and the seconds, of a choice by random scores, near-duplicates dropped."""
    draw, ids = random.Random(0), examples.ok_ids()
    scores = ExampleValues(ids, [draw.random() for _ in ids])
    settings = SelectionSettings(
        preconditioner="none", warmup=Warmup(fraction=0), near_duplicates=NearDuplicates(0.8), data_budget=0.1
    )
    pool = Pool(examples.records, examples.num_tokens, FormatOptions())
    begun = time.process_time()
    with watched() as seen:
        choose_data(settings, len(ids) // 10, scores, pool, {})
    return max(seen) - seen[0], time.process_time() - begun


@contextmanager
def watched() -> Iterator[list[int]]:
    """What `anonymous` tells at the start, every 20 ms while the context is open, and in the end."""
    gc.collect()
    over, seen = threading.Event(), [anonymous()]

    def look() -> None:
        while not over.wait(0.02):
            seen.append(anonymous())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()
        seen.append(anonymous())


def anonymous() -> int:
    """Bytes of this process that are of no file."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    if found is None:
        raise SystemExit("This system does not tell anonymous memory apart; run it on Linux.")
    return int(found[1]) * 1024


def in_a_process(way: Callable[..., Any], pool: str, cache: str, choice: bool) -> Measured:
    """What a way takes in a process of its own, which shares with this one what is imported."""
    here, there = (context := multiprocessing.get_context("fork")).Pipe(duplex=False)
    process = context.Process(target=lambda: there.send(measure(way, pool, cache, choice)))
    process.start()
    there.close()
    try:
        measured: Measured = here.recv()
    except EOFError:
        raise SystemExit(f"{way.__name__} ended without an answer.") from None
    process.join()
    return measured


def write_pool(path: Path, rows: int) -> None:
    """Short rows: a question of some ten words, and an answer of some ten more."""
    draw, words = random.Random(rows), ["the", "sea", "is", "deep", "and", "one", "plus", "two", "makes", "three"]
    with path.open("w", encoding="utf-8") as stream:
        for row in range(rows):
            said = [" ".join(draw.choices(words, k=draw.randint(5, 15))) for _ in range(2)]
            stream.write(json.dumps({"prompt": f"{row}: {said[0]}?", "response": said[1]}) + "\n")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--ways", nargs="+", default=[*WAYS], choices=[*WAYS], help="found after cached")
    parser.add_argument("--cache_dir", help="where the pools and the cache are, for as long as this runs")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # which forked processes would have to do without
    cache_folder.LARGE = 2**20  # so that small pools are treated as large ones are
    with tempfile.TemporaryDirectory(dir=options.cache_dir) as folder:  # what is imported and allocated once
        write_pool(Path(folder) / "pool.jsonl", 600)
        for way in (objects, cached, cached):
            measure(way, f"{folder}/pool.jsonl", f"{folder}/cache", choice=way is cached)
    heads = ("read us", 9), ("encode us", 10), ("cut us", 8), ("choice B/row", 13), ("choice us", 10)
    print(f"{'rows':>10}  {'way':8} {'held B/row':>11}", *(f"{head:>{width}}" for head, width in heads))
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.cache_dir) as folder:
            write_pool(Path(folder) / "pool.jsonl", rows)
            made: list[Any] = []
            for name in options.ways:
                of = in_a_process(WAYS[name], f"{folder}/pool.jsonl", f"{folder}/cache", choice=name == "found")
                times = (
                    f"{1e6 * seconds / rows:{width}.2f}" for seconds, width in zip(of[1:4], (9, 10, 8), strict=True)
                )
                choice = f"{of.peak / rows:13.1f} {1e6 * of.choose / rows:10.2f}" if of.choose else ""
                print(f"{rows:10,}  {name:8} {of.held / rows:11.1f}", *times, choice, flush=True)
                made.append(of.made)
        if any(one != made[0] for one in made):
            raise SystemExit("The three ways make different pools.")


if __name__ == "__main__":
    main()
