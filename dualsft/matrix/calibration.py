"""Times the two ways to a linear layer's rows and columns on a device: what `by_gradient_pays` rests on.

The way by gradient costs each example a pass over the layer's weights and some calls, whatever its length; the way by
product costs each token a product with U. So they cost the same at

    tokens + calls / weights      tokens per example,

which two layers show, one so large that calls count for little, and one for which they do.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dualsft.data.layout import Layout
from dualsft.matrix.linear_tap import BreakEven, example_gradients

LARGE, SMALL = (4096, 4096), (1024, 1024)
"""Layers, (in, out)."""
LENGTH, EXAMPLES, ROUNDS = 512, 16, 5


class Ways(NamedTuple):
    """Seconds of the weight gradient alone, of the way by gradient and of that by product, of a batch."""

    alone: float
    gradient: float
    product: float

    @property
    def are_sound(self) -> bool:
        """Whether the second product shows in the times, as it does unless other work has spoilt them."""
        return self.product > 1.1 * self.alone

    def break_even(self, length: int) -> float:
        """Tokens per example at which both ways cost the same, where examples of this length took so long."""
        return length * max(0.0, self.gradient - self.alone) / (self.product - self.alone)


def measured_break_even(
    device: torch.device,
    dtype: torch.dtype,
    large: tuple[int, int] = LARGE,
    small: tuple[int, int] = SMALL,
    length: int = LENGTH,
    examples: int = EXAMPLES,
) -> BreakEven | None:
    """The break-even of a device for activations of a type, from a few batches of two layers; None if none shows."""
    found = []
    for shape in (large, small):
        ways = both_ways(device, dtype, shape, length, examples, ROUNDS)
        if not ways.are_sound:
            return None
        found.append((shape[0] * shape[1], ways.break_even(length)))
    (many, at_many), (few, at_few) = found
    calls = max(0.0, (at_few - at_many) / (1 / few - 1 / many))
    return BreakEven(max(0.0, at_many - calls / many), calls)


def both_ways(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], length: int, examples: int, rounds: int
) -> Ways:
    """Time both ways for one layer, (in, out), and examples of one length."""
    in_features, out_features = shape
    a = torch.randn(examples, length, in_features, device=device, dtype=dtype)
    e = torch.randn(examples, length, out_features, device=device, dtype=dtype)
    u = torch.randn(out_features, in_features, device=device, dtype=dtype)
    layout = Layout(examples, length, [(row, 0, length) for row in range(examples)])

    def alone() -> Tensor:
        return e.flatten(0, 1).t() @ a.flatten(0, 1)

    def by_product() -> Tensor:
        alone()
        x, y = (e @ u, a) if in_features <= out_features else (a @ u.t(), e)
        return (x.flatten(1).float() * y.flatten(1).float()).sum(1)

    def by_gradient() -> Tensor:
        return example_gradients(e, a, [u], layout, dtype)[0]

    return Ways(*seconds(device, (alone, by_gradient, by_product), rounds))


def seconds(device: torch.device, works: Sequence[Callable[[], Tensor]], rounds: int) -> list[float]:
    """The median time of each piece of work, taken in turns, behind a first call."""
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(rounds + 1):
        for work, times in zip(works, taken, strict=True):
            _wait(device)
            start = time.perf_counter()
            work()
            _wait(device)
            times.append(time.perf_counter() - start)
    return [statistics.median(times[1:]) for times in taken]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
