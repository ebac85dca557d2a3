"""The two ways to a linear layer's rows and columns, timed side by side: what `by_gradient_pays` rests on.

    python benchmarks/linear_tap.py
    python benchmarks/linear_tap.py --device cuda --dtype bfloat16 --batch_tokens 16384 --lengths 128 512 2048 8192

For each layer shape and number of tokens per example it prints the cost of both ways in units of the weight gradient
alone (which is part of both), which one the rule takes, and what the wrong choice would have cost or costs. Last, the
break-even constants that fit these timings best by least squares. On a GPU `dualsft select` measures them by itself
(`dualsft.matrix.calibration`).
"""

import argparse

import numpy as np
import torch

from dualsft.matrix.calibration import both_ways
from dualsft.matrix.linear_tap import by_gradient_pays

SHAPES = [(512, 128), (512, 512), (512, 1376), (1376, 512), (512, 8192)]


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
            examples = options.batch_tokens // length
            ways = both_ways(torch.device(options.device), dtype, shape, length, examples, options.rounds)
            alone, gradient, product = ways
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
            costs.append(ways.break_even(length))
    tokens, calls = np.linalg.lstsq(np.array(rows), np.array(costs), rcond=None)[0]
    print(f"break-even by least squares: {tokens:.0f} + {calls:.2g} / weights tokens per example")


if __name__ == "__main__":
    main()
