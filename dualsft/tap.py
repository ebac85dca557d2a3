"""The tap: a module's share of <u, g_i>, taken from the gradient that backward brings to its output.

    share of example i = Σ e · (∂f/∂w) u_w     over the outputs of f that belong to example i

with f a module, w its own parameters, e the gradient of its output. The product (∂f/∂w) u_w is a Uᵀ for Linear, U[id]
for Embedding, and otherwise comes from forward-mode differentiation of the module's own forward; see `interaction.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from dualsft.errors import UserError


def accumulator_dtype(parameter: Tensor) -> torch.dtype:
    """float32, or float64 for a float64 parameter: sums never live in half precision."""
    return torch.promote_types(parameter.dtype, torch.float32)


@runtime_checkable
class Rows(Protocol):
    """What a tap adds to; `dualsft.interaction.RowSums` is the one there is."""

    tapped: set[int]

    def broadcast(self, output: Tensor) -> Tensor:
        """Give an output that is shared by the whole batch a batch dimension of its own."""

    def by_example(self, values: Tensor, where: str) -> Float[Tensor, "example rest"]:
        """Bring a module's output to one row per example."""

    def add(self, contribution: Float[Tensor, " example"]) -> None:
        """Add one module's share."""


class TapHook:
    """A forward hook that puts a tap on every floating output of one module."""

    def __init__(self, rows: Rows, path: str, module: nn.Module, tangents: Mapping[str, Tensor]) -> None:
        self._rows, self._tangents = rows, tangents
        self.where = f"{path} ({type(module).__name__})"
        self._product = _PRODUCTS.get(type(module), _general_product)
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
            raise UserError(
                f"{self.where} rescales its weights or gradients, so its gradients have no per-example sum."
            )

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The module's output with taps on it, as a forward hook returns it."""
        if not torch.is_grad_enabled():  # as in the jvp of a module around this one
            return None
        inputs, layout = pytree.tree_flatten((args, kwargs))
        outputs, out_layout = pytree.tree_flatten(output)
        for k, value in enumerate(outputs):
            if isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad:
                call = _Call(self, module, layout, inputs, k)
                tensors = [given for given in inputs if isinstance(given, Tensor)]
                outputs[k] = _Tap.apply(self._rows.broadcast(value), call, *tensors)
                self._rows.tapped.add(id(module))
        return pytree.tree_unflatten(outputs, out_layout)

    def contribute(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], k: int, e: Tensor) -> None:
        """Add (∂f/∂w)u · e of the k-th output leaf of one call to the rows.

        Raises:
            UserError: if the module cannot be differentiated forwards, or its output not be split into examples.
        """
        try:
            product = self._product(module, self._tangents, args, kwargs, k, e.dtype)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"{self.where} has no forward-mode derivative, so it cannot be scored: {reason}") from error
        wide = accumulator_dtype(e)
        by_example = self._rows.by_example(product.expand_as(e), self.where).to(wide)
        self._rows.add((by_example * self._rows.by_example(e, self.where).to(wide)).sum(1))


class _Call:
    """One call of a tapped module: which output, and its inputs but for the tensors, which are autograd's to keep."""

    def __init__(self, hook: TapHook, module: nn.Module, layout: Any, inputs: list[Any], output: int) -> None:
        self._hook, self._module, self._layout, self._output = hook, module, layout, output
        self._slots = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        self._rest = [None if isinstance(value, Tensor) else value for value in inputs]

    def contribute(self, e: Tensor, tensors: tuple[Tensor, ...]) -> None:
        """Add this call's share of the rows, given the gradient of the output and the tensors among the inputs."""
        inputs = list(self._rest)
        for slot, tensor in zip(self._slots, tensors, strict=True):
            inputs[slot] = tensor.detach()
        args, kwargs = pytree.tree_unflatten(inputs, self._layout)
        self._hook.contribute(self._module, args, kwargs, self._output, e)


class _Tap(torch.autograd.Function):
    """The identity, whose backward adds (∂f/∂w)u · e to the rows.

    The inputs go through ``save_for_backward``, so activation checkpointing recomputes them and nothing lives longer.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, call: _Call, *inputs: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*inputs)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (e,) = grads
        inputs = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
        ctx.call.contribute(e.detach(), inputs)
        return (e, None, *(None for _ in inputs))


def _linear_product(
    module: nn.Module, u: Mapping[str, Tensor], args: Any, kwargs: Any, k: int, dtype: torch.dtype
) -> Tensor:
    bias = u["bias"].to(dtype) if "bias" in u else None
    (a,) = args or kwargs.values()
    weight = u["weight"].to(dtype) if "weight" in u else torch.zeros_like(module.weight, dtype=dtype)  # type: ignore[arg-type]
    return F.linear(a.to(dtype), weight, bias)


def _embedding_product(
    module: nn.Module, u: Mapping[str, Tensor], args: Any, kwargs: Any, k: int, dtype: torch.dtype
) -> Tensor:
    (ids,) = args or kwargs.values()
    product = F.embedding(ids, u["weight"]).to(dtype)
    # autograd gives the padding row no gradient wherever it occurs
    return product if module.padding_idx is None else product * (ids != module.padding_idx).unsqueeze(-1)


def _general_product(
    module: nn.Module, u: Mapping[str, Tensor], args: Any, kwargs: Any, k: int, dtype: torch.dtype
) -> Tensor:
    """(∂f/∂w)u of the k-th output leaf by forward-mode differentiation of the module's forward in its own weights."""
    own = {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False) if name in u}
    tangents = {name: u[name].to(parameter.dtype) for name, parameter in own.items()}
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        # a subclass; here too autograd gives the padding row no gradient
        tangents["weight"] = tangents["weight"].clone()
        tangents["weight"][module.padding_idx] = 0

    def forward(parameters: dict[str, Tensor]) -> Tensor:
        return pytree.tree_flatten(functional_call(module, parameters, args, kwargs))[0][k]

    with torch.no_grad():
        return jvp(forward, (own,), (tangents,))[1]


_PRODUCTS: dict[type, Callable[..., Tensor]] = {nn.Linear: _linear_product, nn.Embedding: _embedding_product}
