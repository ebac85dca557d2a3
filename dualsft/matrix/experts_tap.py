"""The fast tap for stacked experts (`dualsft.models.experts`), y_r = W_g a_r + b_g for each row r of expert g.

A row is a token at one of its experts, and rows are sorted by expert. With e_r the gradient of y_r the share of the
example i whose tokens have the rows r is

    <dW_i, U> = Σ_r e_r · (U_g a_r + u_g)      or, whichever is narrower, with (U_gᵀ e_r) · a_r

with U the direction of the weights and u that of the biases: one grouped product, beside the three of a plain pass,
whose number of launches does not depend on that of the experts.
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dualsft.data.layout import Layout
from dualsft.matrix.tap import Tap, with_tap
from dualsft.models.dtypes import accumulator_dtype
from dualsft.models.experts import Routes
from dualsft.models.grouped import product


class ExpertsTap(Tap):
    """A tap on the products of grouped experts, whose forward shows them."""

    def register(self) -> RemovableHandle:
        """Hook on to the call, of which ``observe`` becomes an argument."""
        return self.module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments of the module's call with the tap among them; None (they stay) if nothing can be tapped."""
        return self.tapped(partial(self._attach, args, kwargs))

    def _attach(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments, and the tap; raises as `Rows.check_shape` does."""
        hidden_states = next(iter((*args, *kwargs.values())))  # the output has the same shape
        layout = self.rows.layout
        self.rows.check_shape(hidden_states.shape, self.where)
        return args, {**kwargs, "observe": partial(self._observe, layout)}

    def _observe(self, layout: Layout, name: str, a: Tensor, y: Tensor, routes: Routes) -> Tensor:
        """Put the tap on the output of one layer, as `dualsft.models.experts.Observe`."""
        if not {name, f"{name}_bias"} & self._names.keys():
            return y
        add = partial(self._add_to_rows, layout, name, routes.top_k)
        return with_tap(y, add, self.rows.dummy_input, a, routes.experts, routes.places, routes.ends)

    def _add_to_rows(self, layout: Layout, name: str, top_k: int, ctx: Any, e: Tensor) -> None:
        """Add e · (U a + u) of one layer of one call to the rows."""
        a, experts, places, ends = ctx.saved_tensors
        for k, u in enumerate(self.tangents()):
            values = e.new_zeros(len(e), dtype=accumulator_dtype(e))
            if name in u:
                values += self._products(e, a, u[name].to(e.dtype), ends)
            if f"{name}_bias" in u:
                values += _row_dot(u[f"{name}_bias"].to(e.dtype)[experts], e)
            of_tokens = values[places].view(-1, top_k).sum(1)
            self.rows.add(k, of_tokens, torch.ones_like(of_tokens), self.where, layout)

    def _products(self, e: Tensor, a: Tensor, u: Tensor, ends: Tensor) -> Float[Tensor, " row"]:
        """e_r · (U_g a_r) of every row."""
        experts: Any = self.module
        u = u if experts.is_transposed else u.mT
        if a.shape[1] <= e.shape[1]:
            return _row_dot(product(e, u.mT, ends), a)
        return _row_dot(product(a, u, ends), e)


def _row_dot(fresh: Float[Tensor, "row width"], other: Float[Tensor, "row width"]) -> Float[Tensor, " row"]:
    """The inner product of each row with the other's, in float32 at least; may overwrite the first."""
    return fresh.to(accumulator_dtype(fresh)).mul_(other).sum(1)
