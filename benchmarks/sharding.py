"""What a sharded scoring pass holds on each rank and what it sends, for several numbers of ranks side by side.

    python benchmarks/sharding.py                        float32 on this machine's CPU (gloo), a minute or two
    python benchmarks/sharding.py --ranks 1 2 --dtype bfloat16
    python benchmarks/sharding.py --ranks 4 --copies 2    two copies of the model, each on two ranks

Memory is the largest resident set of any rank above what it held before the model was loaded, in bytes per weight of
the whole model; so small a model has most of its weights in a few units, of which two are whole at a time. Beside it
stands the same pass in one process without shards. Every rank of every row is a fresh process.

Traffic is what each rank receives in one step, batches after the first: of the weights, which each unit gathers for
forward and again for backward, of the direction, which it gathers for backward, and of the gradients, which are summed
in float32. The least that such a pass can do is to move each of these whole, less the part that the rank has:

    (ranks - 1) / ranks · weights · (3 · bytes of a weight + 4).

With several copies of the model `ranks` is there the ranks of one, at least two. What a rank then receives from other
copies is told for a step, and for the end of a pass, where the sums of its shard are added up.
"""

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from memory import STEADY, Meter
from scoring import SHAPES, make_batch, make_model
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from dualsft.data.layout import Batch
from dualsft.matrix.passes import gradient_pass
from dualsft.models.dtypes import direction_dtype
from dualsft.models.loading import load_model
from dualsft.selection.passes import scoring_mode
from dualsft.sharding import unit_gather
from dualsft.sharding.groups import form_groups, replicate_group, shard_mesh
from dualsft.sharding.load import load_sharded
from dualsft.sharding.shards import local_shard

PARTS = ("weights", "direction", "gradients", "from copies")


class Received:
    """Bytes that this rank has received, by what they were, and how many at the start of each step."""

    def __init__(self) -> None:
        self.total: Counter[str] = Counter()
        self._starts: list[Counter[str]] = []

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; the work on one is done when the next is asked for."""
        for batch in batches:
            self._starts.append(self.total.copy())
            yield batch

    def by_step(self) -> dict[str, float]:
        """The mean of the steps after the first, which looks at the model and checks rows against autograd.

        What other copies send comes at the end of the pass, or in the steps before the last.
        """
        steps, end = len(self._starts) - 1, self._starts[-1]
        found = {part: (self.total[part] - self._starts[1][part]) / steps for part in PARTS}
        step = (end["from copies"] - self._starts[1]["from copies"]) / max(1, steps - 1)
        return {**found, "from copies": step, "at the end": self.total["from copies"] - end["from copies"]}


@contextmanager
def counted(received: Received) -> Iterator[None]:
    """Counts what units and directions receive, where FSDP2 and `unit_gather` look their collectives up."""
    # torch 2.13 has named them anew
    gather = "all_gather_single" if hasattr(distributed, "all_gather_single") else "all_gather_into_tensor"
    scatter = "reduce_scatter_single" if hasattr(distributed, "reduce_scatter_single") else "reduce_scatter_tensor"
    places = (
        (distributed, gather, "weights"),
        (distributed, scatter, "gradients"),
        (unit_gather, "full_tensor", "direction"),
    )
    originals = [getattr(module, name) for module, name, _ in places]
    for (module, name, part), original in zip(places, originals, strict=True):
        setattr(module, name, _counting(original, received.total, part))
    try:
        yield
    finally:
        for (module, name, _), original in zip(places, originals, strict=True):
            setattr(module, name, original)


@contextmanager
def counted_between_copies(received: Received) -> Iterator[None]:
    """Counts what comes from the ranks that hold the same shard, in a ring."""
    group, all_reduce = replicate_group(), distributed.all_reduce

    def called(tensor: Tensor, *args: Any, **options: Any) -> Any:
        if len(group) > 1 and options.get("group") is group.handle:
            received.total["from copies"] += round(2 * (1 - 1 / len(group)) * tensor.nbytes)
        return all_reduce(tensor, *args, **options)

    distributed.all_reduce = called
    try:
        yield
    finally:
        distributed.all_reduce = all_reduce


def _counting(function: Callable[..., Any], total: Counter[str], part: str) -> Callable[..., Any]:
    """The same function; the larger of its tensors is the ranks' together, the smaller this rank's own."""

    def called(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        plain = [x for x in (*args, *options.values(), result) if isinstance(x, Tensor) and not isinstance(x, DTensor)]
        own, together = sorted(tensor.nbytes for tensor in plain)
        total[part] += together - own
        return result

    return called


def score(model: Any, options: argparse.Namespace, batches: int, rank: int = 0, ranks: int = 1) -> dict[str, float]:
    """Rows and columns of so many batches on each rank, in one pass; what it received in a step."""
    direction = {
        n: torch.full_like(local_shard(p.detach()), 1e-6, dtype=direction_dtype(p)) for n, p in model.named_parameters()
    }
    made = [make_batch(model, options.batch_size, options.tokens) for _ in range(batches * ranks)]
    received = Received()
    with counted(received), counted_between_copies(received), scoring_mode(model, checkpointing=False):
        gradient_pass(model, lambda first: islice(made, first * ranks + rank, None, ranks), received, [direction])
    return received.by_step()


def work(options: argparse.Namespace) -> dict[str, Any]:
    """What one rank of a job, or one process without shards, holds at most and receives."""
    if not options.worker:
        return _measured(options, lambda folder: load_model(str(folder), options.dtype))
    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    form_groups(ranks // options.copies)
    mesh = shard_mesh("cpu")
    found = _measured(options, lambda folder: load_sharded(str(folder), mesh, options.dtype), rank, ranks)
    distributed.destroy_process_group()
    return found


def _measured(
    options: argparse.Namespace, load: Callable[[Path], Any], rank: int = 0, ranks: int = 1
) -> dict[str, Any]:
    """The same on a model of a few weights comes first: it loads the code that torch loads when it is first used."""
    score(load(options.folder / "few").eval(), options, 2, rank, ranks)
    gc.collect()
    meter = Meter("cpu")
    model = load(options.folder / "model").eval()
    gc.collect()
    meter.restart()
    received = score(model, options, options.batches, rank, ranks)
    return {"peak": meter.peak(), **received}


def run(options: argparse.Namespace, folder: Path, ranks: int) -> list[dict[str, Any]]:
    """What each rank measures, all in fresh processes; 0 ranks are one process without shards."""
    given = {**vars(options), "folder": folder, "worker": ranks}
    arguments = [f"--{name}={value}" for name, value in given.items() if not isinstance(value, list)]
    shared = {**os.environ, **STEADY, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(max(ranks, 1))}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env={**shared, "RANK": str(k), "LOCAL_RANK": str(k)},
            stdout=subprocess.PIPE,
        )
        for k in range(max(ranks, 1))
    ]
    answers = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        sys.exit(f"a worker of {ranks} ranks has failed")
    return [json.loads(answer) for answer in answers]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def report(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """The table, line by line as it is measured."""
    model = make_model(options.shape, "cpu", options.dtype)
    model.save_pretrained(folder / "model")
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    AutoModelForCausalLM.from_config(config, dtype=model.dtype).save_pretrained(folder / "few")
    count, itemsize = sum(p.numel() for p in model.parameters()), model.dtype.itemsize
    yield f"{count:,} weights in {options.dtype}, gloo on the CPU, torch {torch.__version__}"
    yield f"batches of {options.batch_size} examples of {options.tokens} tokens on each rank; bytes per weight"
    yield "ranks        peak   of first   received: weights   direction   gradients   in all   of the least   copies"
    (alone,) = run(options, folder, 0)
    yield f"no shards {alone['peak'] / count:7.2f}"
    first = None
    for ranks in options.ranks:
        found = run(options, folder, ranks)
        most = {part: max(of_rank[part] for of_rank in found) / count for part in found[0]}
        first = first or most["peak"]
        shards = ranks // options.copies
        least = (shards - 1) / shards * (3 * itemsize + 4)
        together = sum(most[part] for part in PARTS)
        ratio = f"{together / least:14.3f}" if least else f"{'-':>14}"
        shown = f"{most['weights']:19.3f} {most['direction']:11.3f} {most['gradients']:11.3f} {together:8.3f} {ratio}"
        copies = f"{most['from copies']:.3f}, {most['at the end']:.3f} at the end"
        yield f"{ranks:<9d} {most['peak']:7.2f} {most['peak'] / first:11.3f} {shown}   {copies}"


def main() -> None:
    """Print the table; or, in a process of its own, what one rank measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--copies", type=int, default=1, help="of the model, each on as many ranks")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable_progress_bar()
    if options.folder:
        print(json.dumps(work(options)))
        return
    with TemporaryDirectory() as folder:
        for text in report(options, Path(folder)):
            print(text, flush=True)


if __name__ == "__main__":
    main()
