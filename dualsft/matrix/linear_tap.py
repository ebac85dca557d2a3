"""The fast tap for Linear, y = a Wᵀ + b, where nearly all the work is; also for Conv1D, whose weight is Wᵀ.

With e the gradient of y, and a_i, e_i the tokens of example i, there are two ways to the rows <dW_i, U> when the
columns Σ_i dW_i are wanted too. In units of 2 x tokens x weights floating-point operations:

    by gradient   dW_i = e_iᵀ a_i, one example at a time: its product with U is added to row i, the matrix to the
                  columns. 1 unit, which the columns cost anyway, and memory traffic per example.
    by product    (e U) · a or, whichever is narrower, (a Uᵀ) · e for the rows, and eᵀ a for the columns. 2 units.

So the first is near the limit for long examples, the second better for short ones; `by_gradient_pays` is the rule.
Without columns there is only the second, at the 1 unit that the weight gradient would have cost. Contributions by token
come from the second alone. Several directions U share the dW_i of the first; each takes a product of its own of the
second.

The layer's own backward is replaced, so that the weight gradient is not formed twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from dualsft.data.layout import Layout
from dualsft.data.partial_layout import PartialLayout
from dualsft.matrix.tap import OutputTap
from dualsft.models.dtypes import accumulator_dtype
from dualsft.models.linear import exchange

_BLOCK = 2**20
"""Entries of dW that are formed at a time: 4 MiB stay in a cache while they are multiplied and added."""


class BreakEven(NamedTuple):
    """Where both ways cost the same.

    Attributes:
        tokens: Tokens per example, for a large layer.
        calls: The weights below which the cost of a call counts, times such tokens.
    """

    tokens: float
    calls: float


_BREAK_EVEN = {"cpu": BreakEven(24.0, 3e6), "cuda": BreakEven(2048.0, 3e9)}
"""That of each kind of device. Measured by ``benchmarks/linear_tap.py`` on a CPU; for CUDA, until it has been measured
(`calibration.py`), from the ratio of an H100's arithmetic to its memory bandwidth."""


def settle_break_even(device: str, found: BreakEven) -> None:
    """Go by what was measured on this kind of device from now on."""
    _BREAK_EVEN[device] = found


def by_gradient_pays(tokens_per_example: float, weights: int, device: str) -> bool:
    """Whether forming each dW_i is cheaper than a product with U, for one layer of this many weights."""
    tokens, calls = _BREAK_EVEN.get(device, _BREAK_EVEN["cuda"])
    return tokens_per_example >= tokens + calls / weights


class LinearTap(OutputTap):
    """A tap on a linear layer, whose backward is replaced by one that adds to the rows as well."""

    def attach(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        """The output with the replaced backward."""
        (a,) = args or kwargs.values()
        layout = self.rows.layout
        a, output = layout.expand(a), layout.expand(output)
        self.rows.check_shape(output.shape, self.where)
        call = _Call(self, layout)
        return exchange(self.module, a, output, self.rows.dummy_input, call, weight_too=True)

    def backward(
        self, e: Tensor, a: Tensor, weight: Tensor, needs: tuple[bool, bool, bool], layout: Layout
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Add to the rows, and return the gradients that are needed; see `LinearBackward`."""
        transposed = type(self.module) is Conv1D
        weight = weight.t() if transposed else weight
        tangents = list(self.tangents())
        us = [u["weight"].t() if transposed else u["weight"] for u in tangents]
        needs_input, needs_weight, _ = needs
        narrow = a.to(e.dtype)
        for k, u in enumerate(tangents):
            if "bias" in u:
                self.rows.add(k, e, u["bias"].to(e.dtype).expand_as(e), self.where, layout)
        gradient = None
        if needs_weight:
            gradient = self._weight_gradient(e, narrow, us, weight.dtype, layout)
            gradient = gradient.t() if transposed else gradient
        else:
            self._add_products(e, narrow, us, layout)
        return (e @ weight.to(e.dtype)).to(a.dtype) if needs_input else None, gradient, None

    def _weight_gradient(
        self, e: Tensor, a: Tensor, us: list[Tensor], dtype: torch.dtype, layout: Layout
    ) -> Float[Tensor, "out in"]:
        """Add <dW_i, U> to the rows by the cheaper way, and return the weight gradient Σ_i dW_i."""
        flat = e.shape[:-1] in ((layout.rows, layout.tokens), (layout.rows * layout.tokens,))
        size, device = e.shape[-1] * a.shape[-1], e.device.type
        if not self.rows.by_token and flat and by_gradient_pays(self.rows.batch.mean_length, size, device):
            whole, examples = layout.in_examples if isinstance(layout, PartialLayout) else (layout, None)
            if by_gradient_pays(whole.mean_length, size, device):
                rows, gradient = example_gradients(e, a, us, whole, dtype)
                for k, values in enumerate(rows):
                    self.rows.add_examples(k, values, examples)
                return gradient
        self._add_products(e, a, us, layout)
        return e.flatten(0, -2).t() @ a.flatten(0, -2)

    def _add_products(self, e: Tensor, a: Tensor, us: list[Tensor], layout: Layout) -> None:
        for k, direction in enumerate(us):
            u = direction.to(e.dtype)
            out_features, in_features = u.shape
            x, y = (_wide_product(e, u), a) if in_features <= out_features else (_wide_product(a, u.t()), e)
            self.rows.add(k, x, y, self.where, layout)


@dataclass(frozen=True)
class _Call:
    """One call of a layer, whose backward knows the layout of then."""

    tap: LinearTap
    layout: Layout

    def backward(
        self, e: Tensor, a: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.tap.backward(e, a, weight, needs, self.layout)


def example_gradients(
    e: Float[Tensor, "*tokens out"],
    a: Float[Tensor, "*tokens in"],
    us: Sequence[Float[Tensor, "out in"]],
    layout: Layout,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "direction example"], Float[Tensor, "out in"]]:
    """<e_iᵀ a_i, U> of every direction U and example, and Σ_i e_iᵀ a_i in this type, a block of the matrix at a time.

    The block's longer side comes first, as multiplication into few rows is slow; sums are float32 at least.
    """
    out_features, in_features = us[0].shape
    e, a = (part.reshape(layout.rows, layout.tokens, -1) for part in (e, a))
    transposed = in_features > out_features
    x, y, us = (a, e, [u.t() for u in us]) if transposed else (e, a, us)
    wide = accumulator_dtype(e)
    height, width = us[0].shape
    gradient = e.new_empty((height, width), dtype=dtype)
    step = max(1, _BLOCK // width)
    buffer = e.new_empty((2, min(step, height), width), dtype=wide)
    values = []
    for first in range(0, height, step):
        block = slice(first, first + step)
        parts = [u[block].to(wide).contiguous() for u in us]  # a transposed one is slow to read, once for each example
        one, scratch = buffer[:, : len(parts[0])]
        total = torch.zeros_like(one)
        products = []
        for row, start, length in layout.spans:
            span = slice(start, start + length)
            _outer(x[row, span, block], y[row, span], one)
            # not torch.dot, which adds a million products in a handful of float32 numbers
            products += [torch.mul(one, u, out=scratch).sum() for u in parts]
            total.add_(one)
        values.append(torch.stack(products).double().view(-1, len(us)).t())
        gradient[block] = total
    return torch.stack(values).sum(0), gradient.t() if transposed else gradient


def _wide_product(x: Float[Tensor, "*tokens m"], u: Float[Tensor, "m n"]) -> Float[Tensor, "*tokens n"]:
    """The product x u, in float32 at least where the device can multiply so: that spares a rounding and a launch."""
    wide = accumulator_dtype(x)
    if x.device.type != "cuda" or x.dtype == wide:
        return x @ u
    return torch.mm(x.flatten(0, -2), u, out_dtype=wide).unflatten(0, x.shape[:-1])


def _outer(x: Float[Tensor, "token m"], y: Float[Tensor, "token n"], into: Float[Tensor, "m n"]) -> None:
    """Store xᵀ y; the product is rounded to the target's type once, where the device can multiply so."""
    if x.dtype == into.dtype:
        torch.mm(x.t(), y, out=into)
    elif x.device.type == "cuda":
        into.copy_(torch.mm(x.t(), y, out_dtype=into.dtype))
    else:
        into.copy_(torch.mm(x.t(), y))
