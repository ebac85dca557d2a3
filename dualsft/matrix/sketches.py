"""Norms and sketches of single gradients g_i, for allocators that look at examples beyond their scores.

    gradient norm ‖g_i‖        preconditioned norm ‖P ⊙ g_i‖        sketch  z_i = S (√P ⊙ g_i)

S is a count sketch (Charikar, Chen, Farach-Colton 2002): entry j is added to component j mod K with a random sign of
its own. Then E[z_i · z_k] = g_iᵀ P g_k, and the standard deviation of the estimate is near ‖√P ⊙ g_i‖ ‖√P ⊙ g_k‖ / √K.
K is prime, so that a few columns of large entries, which many weight matrices' gradients have, spread over all
components whatever the matrix's width.

None of this is a sum over the tokens of a batch, so a batch is differentiated one example at a time: the gradient that
backward completes at a parameter is then one example's own, tied weights included.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dualsft.matrix.readout import read_together
from dualsft.models.dtypes import accumulator_dtype
from dualsft.sharding.shards import compute_device, shard_of
from dualsft.sharding.unit_gather import unsharded_parameters

SKETCH_SIZE = 1021
"""Components of a sketch; prime. The cosine of two sketches is that of the gradients to about 0.03."""

_BLOCK = 2**20 // SKETCH_SIZE * SKETCH_SIZE
"""Entries of a gradient that are processed at a time."""

LOSS, NORM, PRECONDITIONED_NORM, SKETCH = "loss", "gradient_norm", "preconditioned_gradient_norm", "sketch"


@dataclass(frozen=True)
class Measurement:
    """The statistics to measure of each example.

    Attributes:
        names: Any of loss, gradient_norm, preconditioned_gradient_norm and sketch.
        preconditioner: Parameter name -> P, of its shape; None for P = 1.
    """

    names: Collection[str] = ()
    preconditioner: Mapping[str, Tensor] | None = None


def sketch_factors(model: nn.Module, measurement: Measurement) -> dict[str, Tensor]:
    """√P with the sketch's signs, by parameter name, of its (local) shape, if it is needed; signs alone are int8."""
    factors: dict[str, Tensor] = {}
    if not set(measurement.names) & {PRECONDITIONED_NORM, SKETCH}:
        return factors
    generator = torch.Generator().manual_seed(0)  # one S for all runs, so that their sketches can be compared
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            signs = random_signs(parameter.numel(), generator).view(parameter.shape)
            factors[name] = shard_of(signs, parameter).to(parameter.device)
            if measurement.preconditioner is not None:
                factors[name] = measurement.preconditioner[name].sqrt().mul_(factors[name])
    return factors


class ExampleStatistics:
    """Measures one example's gradient, parameter by parameter as backward completes it, while the context is open.

    Enter it before `ColumnSums`, which drops each gradient; without `ColumnSums`, set ``drop``. ``factors`` are those
    of `sketch_factors`; in backward they must be full tensors.
    """

    def __init__(self, model: nn.Module, measurement: Measurement, factors: Mapping[str, Tensor], drop: bool) -> None:
        self._drop, self._factors = drop, factors
        self._parameters = {n: p for n, p in unsharded_parameters(model).items() if p.requires_grad}
        sizes = {NORM: (), PRECONDITIONED_NORM: (), SKETCH: (SKETCH_SIZE,)}
        zero = torch.zeros((), dtype=torch.float64, device=compute_device(model))
        self._sums = {name: zero.new_zeros(size) for name, size in sizes.items() if name in measurement.names}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "ExampleStatistics":
        hooks = {name: partial(self._measure, name) for name in self._parameters}
        self._handles = [p.register_post_accumulate_grad_hook(hooks[n]) for n, p in self._parameters.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self) -> None:
        """Forget the last example."""
        for total in self._sums.values():
            total.zero_()

    def read(self) -> dict[str, Float[Tensor, "..."]]:
        """Name -> the statistic of the example whose backward has run, on the host.

        Norms are float64 numbers, the sketch is a float32 vector. All are zero if the loss depends on no weight.
        """
        totals = dict(zip(self._sums, read_together([*self._sums.values()]), strict=True))
        return {name: total.float() if name == SKETCH else total.sqrt() for name, total in totals.items()}

    @torch.no_grad()
    def _measure(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient, wide = parameter.grad.flatten(), accumulator_dtype(parameter)
        factor = self._factors[name].flatten() if name in self._factors else None
        for first in range(0, len(gradient), _BLOCK):
            g = gradient[first : first + _BLOCK].to(wide)
            if NORM in self._sums:
                self._sums[NORM] += g.square().sum()
            if factor is None:
                continue
            root = factor[first : first + _BLOCK]
            scaled = g * root
            if SKETCH in self._sums:
                self._sums[SKETCH] += fold(scaled)
            if PRECONDITIONED_NORM in self._sums:
                self._sums[PRECONDITIONED_NORM] += (scaled * root).square().sum()
        if self._drop:
            parameter.grad = None


def random_signs(count: int, generator: torch.Generator) -> Int8[Tensor, " entry"]:
    """Random numbers, 1 or -1, each as likely."""
    return torch.randint(0, 2, (count,), generator=generator, dtype=torch.int8).mul_(2).sub_(1)


def fold(values: Float[Tensor, " entry"], size: int = SKETCH_SIZE) -> Float[Tensor, " size"]:
    """For each k, the sum of the entries whose position is k modulo the size."""
    even = len(values) // size * size
    folded = values[:even].view(-1, size).sum(0)
    folded[: len(values) - even] += values[even:]
    return folded
