"""Mixtures of experts by grouped products: an implementation of the stacked experts of transformers, of our own.

    y_t = Σ_k c_tk down_e(act(up_e(a_t))),     e = the k-th expert that token t is sent to, with weight c_tk

The pairs of token and expert are sorted by expert, so that each of the two layers is one product of rows with the
matrix of their group (`grouped.py`). In bfloat16 the number of launches does not depend on the number of experts, and
the host never learns how many tokens an expert has; in other types it does, once for a layer. Unlike the
implementations of transformers, this one can be differentiated twice and in forward mode, and it shows the rows of each
product to a caller who asks (`Observe`).

It takes the place of the module's forward by way of transformers' ``ExpertsInterface``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dualsft.models import PreTrainedModel
from dualsft.models.grouped import placed, product

_NAME = "dualsft_grouped"
"""The implementation's name in the configuration of a model that uses it."""

LAYERS = ("gate_up_proj", "up_proj", "down_proj")
"""Names of the stacked weights of a layer, of which a module without gates has the last two."""

EXPERT_WEIGHTS = frozenset(LAYERS) | {f"{name}_bias" for name in LAYERS}
"""Names of all parameters of grouped experts."""


@runtime_checkable
class StackedExperts(Protocol):
    """A module that holds the weights of all experts of a layer in one tensor, (expert, ...).

    Attributes:
        num_experts: How many there are.
        has_gate: Whether ``gate_up_proj`` makes the gates too; else there is ``up_proj``.
        has_bias: Whether each layer has a bias.
        is_transposed: Whether weights are (expert, in, out), not (expert, out, in).
        has_post_expert_norm: Whether a norm with weights of its own follows each expert.
        config: The model's configuration, which names the implementation.
    """

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    has_post_expert_norm: bool
    _is_expert_parallel: bool
    config: Any


def group_experts(model: PreTrainedModel) -> None:
    """Have all stacked experts of a model computed by grouped products; else, by transformers' loop over experts.

    The loop is taken if any of them has a norm behind its experts or holds a rank's experts only. Experts that let
    nobody choose, and those of early releases, which do not tell their shape, are not among them.
    """
    stacked = [module for module in model.modules() if isinstance(module, StackedExperts)]
    grouped = not any(module.has_post_expert_norm or module._is_expert_parallel for module in stacked)
    model.set_experts_implementation(_NAME if stacked and grouped else "eager")


def is_grouped(module: nn.Module) -> bool:
    """Whether this module holds stacked experts that are computed by grouped products."""
    return isinstance(module, StackedExperts) and module.config._experts_implementation == _NAME


@dataclass(frozen=True)
class Routes:
    """Which expert each token goes to, as rows sorted by expert; a token has one row for each of its experts.

    Attributes:
        experts: Each row's expert, ascending.
        order: Each row's number among the pairs (token, k), counted token by token.
        places: Each pair's row: the inverse of ``order``.
        ends: The first row behind those of each expert, int32.
        top_k: Experts of each token.
    """

    experts: Int[Tensor, " row"]
    order: Int[Tensor, " row"]
    places: Int[Tensor, " row"]
    ends: Int[Tensor, " expert"]
    top_k: int

    @classmethod
    def of(cls, chosen: Int[Tensor, "token k"], num_experts: int, dtype: torch.dtype) -> "Routes":
        """The routes of tokens to their chosen experts, for products of this type; in bfloat16 the host never waits."""
        experts, order = chosen.flatten().sort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        each = torch.arange(num_experts, dtype=experts.dtype, device=order.device)
        ends = torch.searchsorted(experts, each, right=True, out_int32=True)
        return cls(experts, order, places, placed(ends, dtype), chosen.shape[-1])

    def sort(self, tokens: Float[Tensor, "token width"]) -> Float[Tensor, "row width"]:
        """The rows of these tokens."""
        pairs = tokens.unsqueeze(1).expand(-1, self.top_k, -1).flatten(0, 1)
        found: Tensor = _Permuted.apply(pairs, self.order, self.places)
        return found

    def unsort(self, rows: Float[Tensor, "row width"]) -> Float[Tensor, "token k width"]:
        """The rows of each token."""
        pairs: Tensor = _Permuted.apply(rows, self.places, self.order)
        return pairs.unflatten(0, (-1, self.top_k))


class _Permuted(torch.autograd.Function):
    """Rows in another order. Autograd's own gradient of indexing sorts, as it does not know that no row is repeated."""

    @staticmethod
    def forward(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return rows.index_select(0, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, *orders = inputs
        ctx.save_for_backward(*orders)
        ctx.save_for_forward(*orders)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        order, inverse = ctx.saved_tensors
        return _Permuted.apply(grads[0], inverse, order), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Permuted.apply(tangents[0], *ctx.saved_tensors)


Observe = Callable[[str, Tensor, Tensor, Routes], Tensor]
"""Sees one of the two products: the name of its weights, one of `LAYERS`, the input (row, in), the output (row, out)
and the routes. Returns the output, possibly with an identity behind it."""


def _unobserved(layer: str, a: Tensor, y: Tensor, routes: Routes) -> Tensor:
    return y


def grouped_experts(
    self: Any,
    hidden_states: Float[Tensor, "token width"],
    top_k_index: Int[Tensor, "token k"],
    top_k_weights: Float[Tensor, "token k"],
    observe: Observe = _unobserved,
) -> Float[Tensor, "token width"]:
    """The forward of stacked experts, with the argument names of transformers, and ``observe`` beside them."""
    routes = Routes.of(top_k_index, self.num_experts, _compute_dtype(self.down_proj))
    up = "gate_up_proj" if self.has_gate else "up_proj"
    rows = _layer(self, up, routes.sort(hidden_states), routes, observe)
    rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
    rows = _layer(self, "down_proj", rows, routes, observe)
    weighted = routes.unsort(rows) * top_k_weights.unsqueeze(-1)
    return weighted.sum(1).to(hidden_states.dtype)


def _layer(experts: Any, name: str, a: Tensor, routes: Routes, observe: Observe) -> Tensor:
    """The product of each row with its expert's weights, in autocast's type where that is on."""
    weights = getattr(experts, name)
    dtype = _compute_dtype(weights)
    a, weights = a.to(dtype), weights.to(dtype)
    y = product(a, weights if experts.is_transposed else weights.mT, routes.ends)
    if experts.has_bias:
        y = y + getattr(experts, f"{name}_bias")[routes.experts].to(dtype)
    return observe(name, a, y, routes)


def _compute_dtype(weights: Tensor) -> torch.dtype:
    kind = weights.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weights.dtype


ALL_EXPERTS_FUNCTIONS.register(_NAME, grouped_experts)
