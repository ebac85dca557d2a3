"""The tap: a module's share of <u, g_i>, taken from the gradient that backward brings to its output.

    share of example i = Σ e · (∂f/∂w) u_w     over the outputs of f that belong to example i

with f a module, w the parameters scored there, and e the gradient of its output. The product (∂f/∂w) u_w comes from
forward-mode differentiation of the module's own forward, whatever the module is. Where f is linear in w it is f with u
in the place of w; where f scales by w, as norms do, the output y times u / w; for Embedding it is U[id]. Linear and
stacked experts, where nearly all the work is, have files of their own (`linear_tap.py`, `experts_tap.py`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from dualsft.data.layout import AmbiguousShapeError, Layout
from dualsft.data.partial_layout import PartialLayout
from dualsft.errors import UserError, is_out_of_memory
from dualsft.matrix.module_call import ModuleCall
from dualsft.matrix.rows import Rows
from dualsft.models.dtypes import accumulator_dtype


class Tap(ABC):
    """A hook on one module whose backward adds the module's share of <u, g_i> to the rows.

    Args:
        rows: The accumulator that the tap adds to.
        where: The module's name and type, for errors.
        names: The module's own names -> the model's name of each parameter that is scored here.
    """

    def __init__(self, rows: Rows, where: str, module: nn.Module, names: Mapping[str, str]) -> None:
        self.rows, self.where, self.module, self._names = rows, where, module, names

    @abstractmethod
    def register(self) -> RemovableHandle:
        """Hook on to the module."""

    def tapped(self, attach: Callable[[], Any]) -> Any:
        """What ``attach`` returns if it has put a tap on something; None if nothing can be tapped.

        A refusal is noted, and raised at the end of the model's forward, where all ranks meet.
        """
        if not torch.is_grad_enabled():  # as in the jvp of a module around this one
            return None
        try:
            found = attach()
        except (AmbiguousShapeError, UserError) as error:
            self.rows.refusals.append(error)
            return None
        if found is not None:
            self.rows.covered |= set(self._names.values())
        return found

    def tangents(self) -> Iterator[dict[str, Tensor]]:
        """Each u by the module's own names; for a sharded model, it is available only in backward."""
        return ({own: u[name] for own, name in self._names.items()} for u in self.rows.directions)


class OutputTap(Tap):
    """A tap on the module's output, put there by a forward hook."""

    def register(self) -> RemovableHandle:
        """Hook on to the output before any other hook, which may exchange it: it must still be the module's own."""
        return self.module.register_forward_hook(self, with_kwargs=True, prepend=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The module's output with the tap on it; None (the output stays) if nothing can be tapped."""
        return self.tapped(partial(self.attach, args, kwargs, output))

    @abstractmethod
    def attach(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output with the tap on it, or None; raises as `Rows.check_shape` does."""


class GeneralTap(OutputTap):
    """A tap on every floating output of any module.

    Raises:
        UserError: if the module's gradients are not sums over examples.
    """

    def __init__(self, rows: Rows, where: str, module: nn.Module, names: Mapping[str, str]) -> None:
        super().__init__(rows, where, module, names)
        self._candidates: dict[int, tuple[int, set[int]]] = {}  # output -> tokens of a row, and the axes of that length
        self._axes: dict[int, int] = {}  # output -> its token axis, where it was found by comparing two batches
        self._is_linear: dict[int, bool] = {}  # output -> whether it is linear in the weights, once that is known
        self._scales: dict[int, bool] = {}  # output -> whether it is scaled by the one weight, once that is known
        self._ratios: dict[int, Tensor] = {}  # direction -> u / w
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
            raise UserError(f"{where} rescales its weights or gradients, so its gradients have no per-example sum.")

    def attach(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output with a tap on each floating leaf; None if there is none."""
        inputs, structure = pytree.tree_flatten((args, kwargs))
        outputs, out_structure = pytree.tree_flatten(output)
        tensors = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
        others = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in inputs]
        floating = [k for k, leaf in enumerate(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        for k in floating:
            layout = self.rows.layout
            value = layout.expand(outputs[k])
            self._check_shape(k, value.shape)
            added: list[bool] = []
            add = partial(self._add_to_rows, layout, others, structure, k, added)
            value = with_tap(value, add, self.rows.dummy_input, *tensors)
            if k not in self._scales:  # before the first tap: no row depends on which batches were before its own
                self._scales[k] = ModuleCall(self.module, args, kwargs, k).scales(self._names)
            if self._scales[k]:
                value = with_tap(value, partial(self._add_scaled, layout, k, added), self.rows.dummy_input, value)
            outputs[k] = value
        return pytree.tree_unflatten(outputs, out_structure) if floating else None

    def _check_shape(self, k: int, shape: torch.Size) -> None:
        """Check that the k-th output can be split; its axes may be ambiguous until batches of two widths are seen.

        Axes that are as long as a row in both all count tokens, as those of attention weights do; the first of them is
        the one whose tokens the output belongs to.
        """
        try:
            self.rows.check_shape(shape, self.where)
        except AmbiguousShapeError:
            tokens, axes = self.rows.layout.tokens, set(self.rows.layout.token_axes(shape))
            width, before = self._candidates.setdefault(k, (tokens, axes))
            if k not in self._axes and width != tokens and axes & before:
                self._axes[k] = min(axes & before)
            if k not in self._axes:
                raise

    def _add_scaled(self, layout: Layout, k: int, added: list[bool], ctx: Any, e: Tensor) -> None:
        """Add (y u / w) · e to the rows, unless the model has modified the output y of this call in place."""
        try:
            (y,) = ctx.saved_tensors
        except RuntimeError as error:
            if _MODIFIED not in str(error):
                raise
            return
        for direction, u in enumerate(self.tangents()):
            if direction not in self._ratios:
                ((name, of),) = u.items()
                weight = self.module.get_parameter(name).detach()
                wide = accumulator_dtype(weight)
                self._ratios[direction] = of.to(weight.dtype).to(wide) / weight.to(wide)
            self._add(direction, y.detach() * self._ratios[direction], e, k, layout)
        added.append(True)

    def _add_to_rows(
        self, layout: Layout, inputs: list[Any], structure: Any, k: int, added: list[bool], ctx: Any, e: Tensor
    ) -> None:
        """Add (∂f/∂w)u · e of the k-th output leaf of one call to the rows.

        Args:
            layout: The layout that the module was called with.
            inputs: The call's flattened arguments, with `_TENSOR` in place of tensors, which autograd keeps.
            structure: Makes positional and keyword arguments of them.
            k: The leaf's number.
            added: Not empty if this has been done by the output.
            ctx: Autograd's context of the call, which keeps the tensors.
            e: The leaf's gradient.
        """
        if added:
            return
        kept = iter(self._saved_tensors(ctx))
        leaves = [next(kept).detach() if leaf is _TENSOR else leaf for leaf in inputs]
        args, kwargs = pytree.tree_unflatten(leaves, structure)
        for direction, u in enumerate(self.tangents()):
            try:
                product = self._product(u, args, kwargs, k, e.dtype)
            except Exception as error:  # the module's own code may raise anything
                if is_out_of_memory(error):
                    raise
                reason = str(error).split("\n")[0]
                raise UserError(
                    f"{self.where} has no forward-mode derivative, so it cannot be scored: {reason}"
                ) from error
            self._add(direction, product.expand_as(e), e, k, layout)

    def _add(self, direction: int, x: Tensor, e: Tensor, k: int, layout: Layout) -> None:
        """Add x · e, with x = (∂f/∂w)u of the k-th output leaf, to the rows of a direction."""
        if isinstance(self.module, nn.Embedding) and self.module.padding_idx is not None:
            # autograd gives the padding row no gradient, be what comes back to it NaN, as of the norm of zeros
            e = e.masked_fill(x == 0, 0)
        if k in self._axes and not isinstance(layout, PartialLayout):
            x, e = (layout.flat(part, self._axes[k]) for part in (x, e))
        self.rows.add(direction, x, e, self.where, layout)

    def _product(self, u: Mapping[str, Tensor], args: Any, kwargs: Any, k: int, dtype: torch.dtype) -> Tensor:
        """(∂f/∂w)u of the k-th output leaf."""
        if type(self.module) is nn.Embedding:
            return _embedding_product(self.module, u, args, kwargs, dtype)
        call = ModuleCall(self.module, args, kwargs, k)
        if k not in self._is_linear and (found := call.is_linear(u)) is not None:
            self._is_linear[k] = found
        return call.output(u) if self._is_linear.get(k) else call.derivative(u)

    def _saved_tensors(self, ctx: Any) -> tuple[Tensor, ...]:
        """The tensors among a call's arguments; under activation checkpointing they can be unpacked only once."""
        try:
            saved: tuple[Tensor, ...] = ctx.saved_tensors
        except RuntimeError as error:
            if _MODIFIED not in str(error):
                raise
            raise UserError(
                f"The input of {self.where} is modified in place after its use there, so it cannot be scored; "
                "freeze its parameters (requires_grad=False) to leave it out of the scores."
            ) from error
        return saved


_TENSOR = object()
_MODIFIED = "modified by an inplace operation"
"""What autograd says of a tensor that it was to keep."""


def with_tap(value: Tensor, add: Callable[[Any, Tensor], None], dummy_input: Tensor, *inputs: Tensor) -> Tensor:
    """The same value, whose gradient e is given to ``add`` on its way back.

    Args:
        value: Any tensor.
        add: Is called with autograd's context, whose ``saved_tensors`` are the inputs, and e.
        dummy_input: As of `Rows`.
        inputs: What it takes to add e's share to the rows.
    """
    tapped: Tensor = _TapFunction.apply(value, add, dummy_input, *inputs)
    return tapped


class _TapFunction(torch.autograd.Function):
    """The identity, whose backward adds (∂f/∂w)u · e to the rows; what it takes to compute that is an argument too.

    The inputs go through ``save_for_backward``, so that activation checkpointing recomputes them and none is kept
    longer than the module's own graph keeps it.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, add: Callable[..., None], dummy_input: Tensor, *inputs: Tensor) -> Tensor:
        ctx.add = add
        ctx.save_for_backward(*inputs)
        return output.detach()  # not a view, which the model could not modify in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (e,) = grads
        ctx.add(ctx, e.detach())
        return (e, *(None for _ in ctx.needs_input_grad[1:]))


def _embedding_product(
    module: nn.Embedding, u: Mapping[str, Tensor], args: Any, kwargs: Any, dtype: torch.dtype
) -> Tensor:
    (ids,) = args or kwargs.values()
    product = F.embedding(ids, u["weight"]).to(dtype)
    # autograd gives the padding row no gradient wherever it occurs
    return product if module.padding_idx is None else product * (ids != module.padding_idx).unsqueeze(-1)
