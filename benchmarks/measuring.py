"""What it costs to measure single gradients in the scoring pass, and to choose a diverse subset by what was measured.

    python benchmarks/measuring.py                     the tables of docs/scoring.md, on this machine's CPU
    python benchmarks/measuring.py --device cuda --shape llama-3.2-3b --dtype bfloat16 --checkpointing

The first table has, for each number of tokens per example, the seconds of a batch in the one pass that first-order
scoring takes, and, as medians over rounds of the ratio to that pass in the same round: the same pass with the examples
one by one; the plain loop over examples that a script would write, one backward pass each and the norm of the gradient,
without any scores; and the scoring pass that measures losses, gradient norms, preconditioned norms, or sketches beside.

The second table has the seconds that `diverse` takes to choose a tenth of a pool by its sketches, and top-k beside it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from scoring import SHAPES, Stopwatch, make_batch, make_model
from torch import Tensor

from dualsft.allocators import Diverse, ScoredExamples, TopK
from dualsft.data.layout import Batch, one_example
from dualsft.matrix.passes import gradient_pass
from dualsft.matrix.sketches import SKETCH_SIZE, Measurement
from dualsft.objectives import example_losses
from dualsft.selection.passes import scoring_mode

MEASURED = ("loss", "gradient_norm", "preconditioned_gradient_norm", "sketch")


def loop_over_examples(model: Any, batches: list[Batch], watch: Stopwatch) -> None:
    """One backward pass for each example, and its gradient's norm."""
    for batch in watch(batches):
        for k in range(len(batch["example_id"])):
            example_losses(model, one_example(batch, k)).sum().backward()
            torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
            model.zero_grad(set_to_none=True)


def compare(
    model: Any, batches: list[Batch], direction: dict[str, Tensor], preconditioner: dict[str, Tensor], rounds: int
) -> dict[str, float]:
    """Seconds of a batch in the one pass, and the others' ratios to it; the first batch of each pass is left out."""
    alone = [one_example(batch, k) for batch in batches for k in range(len(batch["example_id"]))]

    def scoring(given: list[Batch], names: tuple[str, ...], watch: Stopwatch) -> None:
        measurement = Measurement(names, preconditioner)
        gradient_pass(model, lambda first: given[first:], watch, [direction], measurement=measurement)

    passes: dict[str, Callable[[Stopwatch], None]] = {
        "one pass": partial(scoring, batches, ()),
        "one by one": partial(scoring, alone, ()),
        "plain loop": partial(loop_over_examples, model, batches),
        **{name: partial(scoring, batches, (name,)) for name in MEASURED},
    }
    found: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds):
        for name, run in passes.items():
            run(watch := Stopwatch(model.device.type))
            of_first = len(watch.seconds) // len(batches)
            seconds = sum(watch.seconds[of_first:]) / (len(batches) - 1)
            found[name].append(seconds if name == "one pass" else seconds / found["one pass"][-1])
    return {name: statistics.median(values) for name, values in found.items()}


def pool_of(count: int) -> ScoredExamples:
    """Examples whose sketches lie around a few hundred centres, as those of real pools do, half of positive score."""
    generator = torch.Generator().manual_seed(count)
    centres = torch.randn(300, SKETCH_SIZE, generator=generator)
    which = torch.randint(300, (count,), generator=generator)
    return ScoredExamples(
        torch.arange(count),
        torch.randn(count, generator=generator, dtype=torch.float64),
        torch.ones(count, dtype=torch.int64),
        [],
        sketch=centres[which] + torch.randn(count, SKETCH_SIZE, generator=generator),
    )


def seconds_of(allocate: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    allocate()
    return time.perf_counter() - start


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 512])
    parser.add_argument("--batch_tokens", type=int, default=2048)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pools", type=int, nargs="+", default=[1_000, 4_000, 16_000])
    options = parser.parse_args()
    model = make_model(options.shape, options.device, options.dtype)
    direction = {n: 1e-6 * torch.randn_like(p, dtype=torch.float32) for n, p in model.named_parameters()}
    preconditioner = {n: torch.rand_like(u) + 0.5 for n, u in direction.items()}
    weights = sum(p.numel() for p in model.parameters())
    print(f"{weights:,} weights, {options.dtype}, {options.device}, {torch.get_num_threads()} threads, torch", end=" ")
    print(f"{torch.__version__}, {options.batch_tokens} tokens a batch, checkpointing {options.checkpointing}")
    print("tokens/example  one pass s  one by one  plain loop " + "".join(f"{name:>30}" for name in MEASURED))
    for length in options.lengths:
        batches = [make_batch(model, options.batch_tokens // length, length) for _ in range(options.batches)]
        with scoring_mode(model, options.checkpointing):
            found = compare(model, batches, direction, preconditioner, options.rounds)
        print(
            f"{length:14d} {found['one pass']:11.3f} {found['one by one']:11.2f} {found['plain loop']:11.2f}", end=" "
        )
        print("".join(f"{found[name]:30.2f}" for name in MEASURED), flush=True)
    print("examples in the pool    diverse s    top-k s")
    for count in options.pools:
        pool = pool_of(count)
        took = [seconds_of(partial(rule.allocate, pool, count // 10)) for rule in (Diverse(), TopK())]
        print(f"{count:20,} {took[0]:12.2f} {took[1]:10.4f}", flush=True)


if __name__ == "__main__":
    main()
