"""The two ways to a linear layer's rows and columns, timed side by side: what `by_gradient_pays` rests on.

    python benchmarks/linear_tap.py
    python benchmarks/linear_tap.py --device cuda --dtype bfloat16 --batch_tokens 16384 --lengths 128 512 2048 8192

For each layer shape and number of tokens per example it prints the cost of both ways in units of the weight gradient
alone (which is part of both), which one the rule takes, and what the wrong choice would have cost or costs. Last, the
break-even constants that fit these timings best by least squares.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from dualsft.data.layout import Layout
from dualsft.matrix.linear_tap import by_gradient_pays, example_gradients

SHAPES = [(512, 128), (512, 512), (512, 1376), (1376, 512), (512, 8192)]


def seconds(device: str, work: Callable[[], object], rounds: int) -> float:
    """Median time of one call."""
    taken = []
    for _ in range(rounds + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def both_ways(
    device: str, dtype: torch.dtype, shape: tuple[int, int], length: int, batch_tokens: int, rounds: int
) -> tuple[float, float, float]:
    """Seconds of the weight gradient alone, of the way by gradient, and of the way by product."""
    in_features, out_features = shape
    examples = batch_tokens // length
    a = torch.randn(examples, length, in_features, device=device, dtype=dtype)
    e = torch.randn(examples, length, out_features, device=device, dtype=dtype)
    u = torch.randn(out_features, in_features, device=device)
    layout = Layout(examples, length, [(row, 0, length) for row in range(examples)])

    def alone() -> torch.Tensor:
        return e.flatten(0, 1).t() @ a.flatten(0, 1)

    def by_product() -> torch.Tensor:
        alone()
        narrow = u.to(dtype)
        x, y = (e @ narrow, a) if in_features <= out_features else (a @ narrow.t(), e)
        return (x.flatten(1).float() * y.flatten(1).float()).sum(1)

    def by_gradient() -> torch.Tensor:
        return example_gradients(e, a, [u], layout, dtype)[0]

    return tuple(seconds(device, work, rounds) for work in (alone, by_gradient, by_product))  # type: ignore[return-value]


def main() -> None:
    """Print the table and the fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch_tokens", type=int, default=4096)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    print("in -> out      tokens/example   by gradient   by product   the rule takes")
    rows, costs = [], []
    for shape in SHAPES:
        weights = shape[0] * shape[1]
        for length in options.lengths:
            alone, gradient, product = both_ways(
                options.device, dtype, shape, length, options.batch_tokens, options.rounds
            )
            chosen = by_gradient_pays(length, weights, options.device)
            better = gradient < product
            verdict = "" if chosen == better else f", {max(gradient, product) / min(gradient, product):.2f} x the other"
            print(
                f"{shape[0]:5d} -> {shape[1]:5d} {length:14d} {gradient / alone:13.2f} {product / alone:12.2f}   "
                f"{'gradient' if chosen else 'product'}{verdict}",
                flush=True,
            )
            # what the way by gradient costs per example, in tokens' worth of a product with U
            rows.append((1.0, 1 / weights))
            costs.append((gradient - alone) / (product - alone) * length)
    tokens, calls = np.linalg.lstsq(np.array(rows), np.array(costs), rcond=None)[0]
    print(f"break-even by least squares: {tokens:.0f} + {calls:.2g} / weights tokens per example")


if __name__ == "__main__":
    main()
