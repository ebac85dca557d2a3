"""The tap: a module's share of <u, g_i>, taken from the gradient that backward brings to its output.

    share of example i = Σ e · (∂f/∂w) u_w     over the outputs of f that belong to example i

with f a module, w the parameters scored there, and e the gradient of its output. The product (∂f/∂w) u_w comes from
forward-mode differentiation of the module's own forward, whatever the module is; for Embedding it is U[id], and Linear,
where nearly all the work is, has a file of its own (`linear_tap.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from dualsft.data.layout import AmbiguousShapeError
from dualsft.errors import UserError, is_out_of_memory
from dualsft.matrix.rows import Rows


class TapHook:
    """A forward hook that puts a tap on every floating output of one module.

    Args:
        rows: What the taps add to.
        where: The module's name and type, for errors.
        module: The module.
        tangents: For each direction, u for each parameter that is scored here, under every name it has in the module.

    Raises:
        UserError: if the module's gradients are not sums over examples.
    """

    def __init__(self, rows: Rows, where: str, module: nn.Module, tangents: Sequence[Mapping[str, Tensor]]) -> None:
        self._rows, self.where, self._tangents = rows, where, tangents
        self._candidates: dict[int, tuple[int, set[int]]] = {}  # output -> tokens of a row, and the axes of that length
        self._axes: dict[int, int] = {}  # output -> its token axis, where it was found by comparing two batches
        self._product = _embedding_product if type(module) is nn.Embedding else _general_product
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
            raise UserError(
                f"{self.where} rescales its weights or gradients, so its gradients have no per-example sum."
            )

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The module's output with taps on it; None, which leaves it, if nothing can be tapped."""
        if not torch.is_grad_enabled():  # as in the jvp of a module around this one
            return None
        inputs, structure = pytree.tree_flatten((args, kwargs))
        outputs, out_structure = pytree.tree_flatten(output)
        tensors = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
        others = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in inputs]
        floating = [k for k, leaf in enumerate(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        for k in floating:
            value = self._rows.layout.expand(outputs[k])
            self._check_shape(k, value.shape)
            call = _Call(self, module, others, structure, k)
            outputs[k] = _Tap.apply(value, call, self._rows.dummy_input, *tensors)
        return pytree.tree_unflatten(outputs, out_structure) if floating else None

    def _check_shape(self, k: int, shape: torch.Size) -> None:
        """Check that the k-th output can be split.

        Axes that are as long as a row in batches of two widths all count tokens, as those of attention weights do; the
        first of them is the one whose tokens the output belongs to.

        Raises:
            AmbiguousShapeError: if only one width has been seen.
            UserError: if it cannot be split.
        """
        try:
            self._rows.check_shape(shape, self.where)
        except AmbiguousShapeError:
            tokens, axes = self._rows.layout.tokens, set(self._rows.layout.token_axes(shape))
            width, before = self._candidates.setdefault(k, (tokens, axes))
            if k not in self._axes and width != tokens and axes & before:
                self._axes[k] = min(axes & before)
            if k not in self._axes:
                raise

    def add_to_rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], k: int, e: Tensor) -> None:
        """Add (∂f/∂w)u · e of the k-th output leaf of one call to the rows.

        Raises:
            UserError: if the module cannot be differentiated forwards.
        """
        for direction, u in enumerate(self._tangents):
            try:
                product = self._product(module, u, args, kwargs, k, e.dtype)
            except Exception as error:  # the module's own code may raise anything
                if is_out_of_memory(error):
                    raise
                reason = str(error).split("\n")[0]
                raise UserError(
                    f"{self.where} has no forward-mode derivative, so it cannot be scored: {reason}"
                ) from error
            x, y = product.expand_as(e), e
            if k in self._axes:
                x, y = (self._rows.layout.flat(part, self._axes[k]) for part in (x, y))
            self._rows.add(direction, x, y, self.where)


_TENSOR = object()


@dataclass(frozen=True)
class _Call:
    """One output of one call of a tapped module.

    Attributes:
        hook: The module's tap.
        module: The module.
        inputs: The flattened arguments, with `_TENSOR` in place of tensors, which autograd keeps.
        structure: Makes positional and keyword arguments of them.
        output: The output's number among the flattened outputs.
    """

    hook: TapHook
    module: nn.Module
    inputs: list[Any]
    structure: Any
    output: int


class _Tap(torch.autograd.Function):
    """The identity, whose backward adds (∂f/∂w)u · e to the rows.

    The inputs go through ``save_for_backward``, so that activation checkpointing recomputes them and none is kept
    longer than the module's own graph keeps it.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, call: _Call, dummy_input: Tensor, *inputs: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*inputs)
        return output.detach()  # not a view, which the model could not modify in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (e,), call = grads, ctx.call
        try:
            saved = ctx.saved_tensors  # once: activation checkpointing gives them a single time
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise UserError(
                f"The input of {call.hook.where} is modified in place after its use there, so it cannot be scored; "
                "freeze its parameters (requires_grad=False) to leave it out of the scores."
            ) from error
        tensors = iter(saved)
        inputs = [next(tensors).detach() if leaf is _TENSOR else leaf for leaf in call.inputs]
        args, kwargs = pytree.tree_unflatten(inputs, call.structure)
        call.hook.add_to_rows(call.module, args, kwargs, call.output, e.detach())
        return (e, None, None, *(None for _ in saved))


def _embedding_product(
    module: nn.Module, u: Mapping[str, Tensor], args: Any, kwargs: Any, k: int, dtype: torch.dtype
) -> Tensor:
    (ids,) = args or kwargs.values()
    product = F.embedding(ids, u["weight"]).to(dtype)
    # autograd gives the padding row no gradient wherever it occurs
    return product if module.padding_idx is None else product * (ids != module.padding_idx).unsqueeze(-1)


class _Forward(nn.Module):
    """A module's forward without its hooks: these have run on the inputs already, and may change its parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return self.module.forward(*args, **kwargs)


def _general_product(
    module: nn.Module, u: Mapping[str, Tensor], args: Any, kwargs: Any, k: int, dtype: torch.dtype
) -> Tensor:
    """(∂f/∂w)u of the k-th output leaf by forward-mode differentiation of the module's forward in its own weights."""
    own = {name: module.get_parameter(name).detach() for name in u}
    tangents = {name: u[name].to(parameter.dtype) for name, parameter in own.items()}
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        # a subclass; here too autograd gives the padding row no gradient
        tangents["weight"] = tangents["weight"].clone()
        tangents["weight"][module.padding_idx] = 0

    alone = _Forward(module)

    def forward(parameters: dict[str, Tensor]) -> Tensor:
        named = {f"module.{name}": parameter for name, parameter in parameters.items()}
        return pytree.tree_flatten(functional_call(alone, named, args, kwargs, tie_weights=False))[0][k]

    # fused attention has no forward-mode derivative
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return jvp(forward, (own,), (tangents,))[1]
