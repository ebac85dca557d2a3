"""Host memory and time of the numbers of examples, from a pass to the table: in dictionaries, as before, and in arrays.

    python benchmarks/example_values.py                    two million examples, half a minute of CPU
    python benchmarks/example_values.py --examples 10000000 --ways arrays

Both ways take the same steps, each way in a process of its own:

    rows          the scores by two directions, added in batches of 64, in the order of the examples' lengths
    statistic     a loss of each example, from the tensor of each batch: one tensor an example before
    normalised    both scores times the number of tokens
    combined      the mean of both
    chosen        a tenth of the examples, by top_k
    table         scores of both sets and the combined ones, as columns of a parquet file

Bytes are what the process holds more after a step, and for its peak at most during it, as seen every 20 ms (Linux:
RssAnon); times are of the process. What the two ways make is the same, or the program ends.
"""

import argparse
import ctypes
import gc
import hashlib
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pools import watched
from torch import Tensor

from dualsft.allocators import ScoredExamples, TopK
from dualsft.matrix.example_values import ExampleValues
from dualsft.matrix.pass_result import GradientPass
from dualsft.selection.directions import combined_rows
from dualsft.selection.normalization import scaled, token_counts

BATCH = 64


class Pool(NamedTuple):
    """What a pass gives of each example, in the order of the pass; and the tokens of each row."""

    ids: np.ndarray
    rows: np.ndarray
    losses: Tensor
    num_tokens: np.ndarray

    def batches(self) -> Iterator[slice]:
        """The batches of the pass."""
        return (slice(first, first + BATCH) for first in range(0, len(self.ids), BATCH))


class Dictionaries:
    """The numbers as Python objects."""

    def fill(self, pool: Pool) -> Any:
        """Rows by two directions."""
        rows: list[dict[int, float]] = [{} for _ in pool.rows]
        for part in pool.batches():
            ids = pool.ids[part].tolist()
            for of, found in zip(rows, pool.rows[:, part].tolist(), strict=True):
                of.update(zip(ids, found, strict=True))
        return rows

    def measure(self, pool: Pool) -> Any:
        """Losses."""
        losses: dict[int, Tensor] = {}
        for part in pool.batches():
            losses.update(zip(pool.ids[part].tolist(), pool.losses[part].clone(), strict=True))
        return losses

    def normalise(self, rows: Any, pool: Pool) -> Any:
        """Rows times tokens."""
        factors = {i: float(pool.num_tokens[i]) for i in rows[0]}
        return [{i: value * factors[i] for i, value in of.items()} for of in rows]

    def combine(self, rows: Any) -> Any:
        """The mean of the rows."""
        values = torch.stack([torch.tensor(list(of.values()), dtype=torch.float64) for of in rows]).mean(0)
        return dict(zip(rows[0], values.tolist(), strict=True))

    def arrays(self, scores: Any) -> tuple[np.ndarray, np.ndarray]:
        """Ids, ascending, and their scores."""
        ids = np.sort(np.fromiter(scores, np.int64, len(scores)))
        return ids, np.fromiter((scores[i] for i in ids.tolist()), np.float64, len(ids))

    def column(self, scores: Any, count: int) -> pa.Array:
        """A column of the table."""
        column, missing = np.zeros(count), np.ones(count, bool)
        ids = np.fromiter(scores, np.int64, len(scores))
        column[ids], missing[ids] = np.fromiter(scores.values(), np.float64, len(scores)), False
        return pa.array(column, mask=missing)


class Arrays:
    """The numbers in `ExampleValues`."""

    def fill(self, pool: Pool) -> Any:
        """Rows by two directions."""
        rows = [ExampleValues() for _ in pool.rows]
        for part in pool.batches():
            ids = pool.ids[part].tolist()
            for of, found in zip(rows, pool.rows[:, part].tolist(), strict=True):
                of.add(ids, found)
        return rows

    def measure(self, pool: Pool) -> Any:
        """Losses."""
        found = GradientPass({})
        for part in pool.batches():
            found.measure("loss", pool.ids[part].tolist(), pool.losses[part].clone())
        return found.measured["loss"]

    def normalise(self, rows: Any, pool: Pool) -> Any:
        """Rows times tokens."""
        factors = token_counts(rows[0].ids, pool.num_tokens)
        return [scaled(of, factors) for of in rows]

    def combine(self, rows: Any) -> Any:
        """The mean of the rows."""
        return combined_rows(rows, "mean")

    def arrays(self, scores: Any) -> tuple[np.ndarray, np.ndarray]:
        """Ids, ascending, and their scores."""
        ids = np.sort(scores.ids)
        return ids, scores.at(ids)

    def column(self, scores: Any, count: int) -> pa.Array:
        """A column of the table."""
        column, missing = np.zeros(count), np.ones(count, bool)
        column[scores.ids], missing[scores.ids] = scores.numbers, False
        return pa.array(column, mask=missing)


WAYS: dict[str, type[Dictionaries | Arrays]] = {"dictionaries": Dictionaries, "arrays": Arrays}


class Step(NamedTuple):
    """Bytes held more, bytes at most, and seconds."""

    held: int
    peak: int
    seconds: float


def measure(way: Dictionaries | Arrays, examples: int, folder: Path) -> tuple[dict[str, Step], str]:
    """What each step takes in this process, and a digest of what they make."""
    pool, steps = make_pool(examples), dict[str, Step]()
    give_back()

    @contextmanager
    def step(name: str) -> Iterator[None]:
        begun = time.process_time()
        with watched() as seen:
            yield
            seconds = time.process_time() - begun
            give_back()
        steps[name] = Step(seen[-1] - seen[0], max(seen) - seen[0], seconds)

    with step("rows"):
        rows = way.fill(pool)
    with step("statistic"):
        losses = way.measure(pool)
    with step("normalised"):
        by_set = way.normalise(rows, pool)
    with step("combined"):
        scores = way.combine(by_set)
    with step("chosen"):
        chosen = choose(*way.arrays(scores), pool)
    with step("table"):
        columns = {f"score_{k}": way.column(of, examples) for k, of in enumerate((scores, *by_set))}
        pq.write_table(pa.table(columns), folder / "examples.parquet")
        del columns
    made = hashlib.sha256((folder / "examples.parquet").read_bytes() + chosen.numpy().tobytes())
    made.update(repr([(i, float(losses[i])) for i in pool.ids[:100].tolist()]).encode())
    return steps, made.hexdigest()


def give_back() -> None:
    """Give what was freed back to the system, which otherwise counts as held."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)


def choose(ids: np.ndarray, scores: np.ndarray, pool: Pool) -> Tensor:
    """A tenth of the examples."""
    known, tokens = torch.from_numpy(ids), torch.from_numpy(pool.num_tokens[ids])
    return TopK().allocate(ScoredExamples(known, torch.from_numpy(scores), tokens, records=[]), len(ids) // 10)


def make_pool(examples: int) -> Pool:
    """Random numbers; examples in a random order."""
    draw = np.random.default_rng(0)
    losses = torch.from_numpy(draw.exponential(size=examples))
    return Pool(draw.permutation(examples), draw.normal(size=(2, examples)), losses, draw.integers(1, 99, examples))


def in_a_process(action: Callable[[], Any]) -> Any:
    """What an action gives in a process of its own, which shares with this one what is imported."""
    here, there = (context := multiprocessing.get_context("fork")).Pipe(duplex=False)
    process = context.Process(target=lambda: there.send(action()))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise SystemExit("A process ended without an answer.") from None
    finally:
        process.join()


def table(found: Mapping[str, dict[str, Step]], examples: int) -> Iterator[str]:
    """The figures side by side, an example's share of each."""
    yield f"{examples:,} examples" + "".join(f"{way:>36}" for way in found)
    yield f"{'':12}" + f"{'held B':>16}{'peak B':>10}{'us':>10}" * len(found)
    for name in next(iter(found.values())):
        shares = [(of[name].held / examples, of[name].peak / examples, of[name].seconds) for of in found.values()]
        yield f"{name:12}" + "".join(f"{h:16.1f}{p:10.1f}{1e6 * s / examples:10.2f}" for h, p, s in shares)
    held, seconds = ([sum(step[k] for step in of.values()) for of in found.values()] for k in (0, 2))
    totals = zip(held, seconds, strict=True)
    yield f"{'together':12}" + "".join(f"{h / examples:16.1f}{'':10}{1e6 * s / examples:10.2f}" for h, s in totals)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2_000_000)
    parser.add_argument("--ways", nargs="+", default=[*WAYS], choices=[*WAYS])
    options = parser.parse_args()
    found: dict[str, dict[str, Step]] = {}
    made = set()
    with tempfile.TemporaryDirectory() as folder:
        measure(Dictionaries(), 1000, Path(folder))  # what is imported and allocated once
        for name in options.ways:
            found[name], digest = in_a_process(partial(measure, WAYS[name](), options.examples, Path(folder)))
            made.add(digest)
    if len(made) > 1:
        raise SystemExit("The two ways make different numbers.")
    print("\n".join(table(found, options.examples)))


if __name__ == "__main__":
    main()
