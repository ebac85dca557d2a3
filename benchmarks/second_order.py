"""What the statistics of second-order scorers cost, and several directions at once, beside a plain pass in one run.

    python benchmarks/second_order.py                            a Llama of 21.6M weights on this machine's CPU
    python benchmarks/second_order.py --shape llama-3.2-3b --device cuda --dtype bfloat16 --checkpointing

Each figure is the median over rounds of the ratio to a plain forward and backward pass over the same batches in the
same round; the first batch of each pass is left out. The central difference is both of its passes together, with the
weights displaced and put back; half precision has none.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from scoring import SHAPES, Stopwatch, make_batch, make_model, plain_pass
from torch import Tensor

from dualsft.data.layout import Batch
from dualsft.matrix.curvature import HessianVectorProduct, difference_step, displaced, twice_differentiable
from dualsft.matrix.passes import gradient_pass
from dualsft.selection.passes import scoring_mode

Work = Callable[[Stopwatch], None]


def works(model: Any, batches: list[Batch], direction: dict[str, Tensor]) -> dict[str, Work]:
    """What is timed, by name."""

    def run(watch: Stopwatch, count: int = 0, **options: Any) -> None:
        gradient_pass(model, lambda first: batches[first:], watch, [direction] * count, **options)

    def plain(watch: Stopwatch) -> None:
        for batch in watch(batches):
            plain_pass(model, batch)

    def product(watch: Stopwatch) -> None:
        with twice_differentiable(model):
            run(watch, derivative=HessianVectorProduct(model, direction))

    def difference(watch: Stopwatch) -> None:
        step = difference_step(model, direction)
        for sign in (1, -1):
            with displaced(model, direction, sign * step):
                run(watch)

    found: dict[str, Work] = {
        "plain": plain,
        "gradient": run,
        "squared gradients": lambda watch: run(watch, squared=True),
        "Hessian-vector product, exact": product,
        "rows and columns, one direction": lambda watch: run(watch, 1),
        "rows and columns, three directions": lambda watch: run(watch, 3),
        "rows alone, one direction": lambda watch: run(watch, 1, columns=False),
        "rows alone, three directions": lambda watch: run(watch, 3, columns=False),
    }
    return {**found, "Hessian-vector product, difference": difference} if model.dtype == torch.float32 else found


def measure(work: Work, batches: int, device: str) -> float:
    """Seconds a batch, all passes of the work added up, without the first batch of each."""
    work(watch := Stopwatch(device))
    passes = len(watch.seconds) // batches
    return sum(s for k, s in enumerate(watch.seconds) if k % batches) / (len(watch.seconds) - passes) * passes


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per example")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    model = make_model(options.shape, options.device, options.dtype)
    size = options.batch_tokens // options.tokens
    batches = [make_batch(model, size, options.tokens) for _ in range(options.batches)]
    direction = {n: torch.randn_like(p, dtype=torch.float32) for n, p in model.named_parameters()}
    ratios: dict[str, list[float]] = {}
    with scoring_mode(model, options.checkpointing):
        for _ in range(options.rounds):
            seconds = {n: measure(w, len(batches), options.device) for n, w in works(model, batches, direction).items()}
            for name, value in seconds.items():
                ratios.setdefault(name, []).append(value if name == "plain" else value / seconds["plain"])
    weights = sum(p.numel() for p in model.parameters())
    print(f"{weights:,} weights, {options.dtype}, {options.device}, torch {torch.__version__}")
    print(f"batches of {size} examples of {options.tokens} tokens; medians of {options.rounds} rounds")
    for name, values in ratios.items():
        unit = "s per batch" if name == "plain" else "x plain"
        print(f"{name:38} {statistics.median(values):8.3f} {unit}")


if __name__ == "__main__":
    main()
