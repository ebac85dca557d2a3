"""How fast the host adds up gradients that come from an accelerator, beside additions of whole tensors.

    python benchmarks/host_sums.py                   on one thread
    python benchmarks/host_sums.py --threads 8

Nanoseconds for each weight, of bfloat16 gradients into float32 sums: by `HostSums`, whose copies are from memory to
memory here and not over a bus, and by one addition of a whole gradient. A batch of 8 billion weights takes 8 s for each
nanosecond, beside its forward and backward pass.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from dualsft.matrix.host_sums import HostSums


def main() -> None:
    """Print both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", type=int, default=2**26)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    gradient = torch.randn(options.weights).bfloat16()
    pieces, whole = ({"w": torch.zeros(options.weights)} for _ in range(2))
    with HostSums(pieces, squared=False, device=torch.device("cpu")) as sums:

        def in_pieces() -> None:
            sums.add("w", gradient)
            sums.complete()

        times = [(_seconds(in_pieces), _seconds(lambda: whole["w"].add_(gradient))) for _ in range(options.rounds)]
    assert torch.equal(pieces["w"], whole["w"])
    ours, plain = (1e9 * median(of) / options.weights for of in zip(*times, strict=True))
    print(
        f"in pieces {ours:.2f} ns, whole {plain:.2f} ns, ratio {ours / plain:.2f}; 8 billion: {8 * ours:.1f} s a batch"
    )


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
