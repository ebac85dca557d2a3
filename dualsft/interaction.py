"""The interaction matrix, on one page.

    M_ij = g_ij u_j,     g_i = ∇ l_i(θ),     u = a direction in weight space, chosen by a scorer

    data utility           φ_i = Σ_j M_ij = <u, g_i>          row sums:     `RowSums`
    parameter importance   φ_j = Σ_i M_ij = u_j Σ_i g_ij      column sums:  `ColumnSums`
    Σ_i φ_i = Σ_j φ_j                                         the sum identity, an end-to-end check of both

Source: Chen, Yang, Wu, "One Algorithm, Two Goals: Dual Scoring for Parameter and Data Selection in LLM Fine-Tuning",
arXiv 2605.06166. M has (examples x weights) entries and is never formed; neither is any g_i. Both sums come from one
ordinary backward pass over a batch of examples:

*Rows.* Let f be a module with parameters w of its own, y = f(w, a) its output and e = ∂(Σ_i l_i)/∂y the gradient that
backward brings. Its share of <u, g_i> is the local Jacobian-vector product (∂f/∂w) u_w dotted with e, over the outputs
that belong to example i. Summed over all modules this is exact, and a tied weight counts once per use, as it must.
For Linear the product is a Uᵀ, for Embedding U[id], and for anything else `torch.func.jvp` of the module's own forward.

*Columns.* The weight gradients of Σ_i l_i are Σ_i g_i already; each is folded into a float32 sum and dropped as soon as
it is complete, so that one layer's dense gradient lives at a time.
"""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from dualsft.errors import UserError

Direction = Mapping[str, Tensor]
"""Parameter name -> u, of the parameter's shape."""


class ColumnSums:
    """Σ_i g_i of every trainable parameter, accumulated over all backward passes while the context is open.

    Attributes:
        sums: Parameter name -> sum of gradients, of the parameter's shape, in float32 (float64 for float64 weights).
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.sums = {n: torch.zeros_like(p, dtype=accumulator_dtype(p)) for n, p in self._parameters.items()}
        self._handles: list[RemovableHandle] = []
        self._finite: list[Tensor] = []

    def __enter__(self) -> "ColumnSums":
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._folder(name))
            for name, parameter in self._parameters.items()
        ]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def _folder(self, name: str) -> Callable[[Tensor], None]:
        def fold(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._finite.append(parameter.grad.isfinite().all())
            self.sums[name].add_(parameter.grad)
            parameter.grad = None

        return fold

    @property
    def poisoned(self) -> bool:
        """Whether a non-finite gradient has been folded since `reset`; waits for the device."""
        if self._finite:
            self._finite = [torch.stack(self._finite).all()]
        return bool(self._finite) and not bool(self._finite[0])

    def reset(self) -> None:
        """Start again from zero."""
        self._finite = []
        for total in self.sums.values():
            total.zero_()


def accumulator_dtype(parameter: Tensor) -> torch.dtype:
    """float32, or float64 for a float64 parameter: sums never live in half precision."""
    return torch.promote_types(parameter.dtype, torch.float32)


class RowSums:
    """<u, g_i> of every example of the batch in flight, from taps on the modules' outputs while the context is open.

    Use: ``with RowSums(model, u) as rows: rows.begin(b, t); losses(batch).sum().backward(); phi = rows.read()``.

    Args:
        model: Any module whose trainable parameters are all used by the module that owns them.
        direction: u for every trainable parameter.
    """

    def __init__(self, model: nn.Module, direction: Direction) -> None:
        self._model = model
        self._direction = direction
        self._names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        self._handles: list[RemovableHandle] = []
        self._batch = self._tokens = 0
        self._rows: Tensor | None = None
        self._tapped: set[int] = set()

    def __enter__(self) -> "RowSums":
        for path, module in self._model.named_modules():
            own = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
            if own:
                tangents = {n: self._direction[self._names[id(p)]] for n, p in own.items()}
                hook = _TapHook(self, path, module, tangents)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, examples: int, tokens: int) -> None:
        """Forget the last batch and expect one of this many examples, padded to this many tokens."""
        self._batch, self._tokens, self._rows = examples, tokens, None

    def read(self) -> Float[Tensor, " example"]:
        """<u, g_i> of the batch whose backward has run."""
        if self._rows is None:
            raise RuntimeError("no backward pass has run since begin()")
        return self._rows

    def check_covered(self, sums: Mapping[str, Tensor]) -> float:
        """The share of the model's weights that the rows cover: all but the frozen ones, or there is an error.

        A weight that got no gradient counts as covered: its share of every row is zero.

        Raises:
            UserError: naming the parameters that take part in the loss outside the forward of the module that owns
                them, where no tap can see them.
        """
        covered = {name for module, name in self._owned() if id(module) in self._tapped}
        missed = [name for name, total in sums.items() if name not in covered and bool(total.count_nonzero())]
        if missed:
            kinds = {type(self._model.get_submodule(n.rpartition(".")[0])).__name__ for n in missed}
            raise UserError(
                f"These parameters are used outside their own module's forward ({', '.join(sorted(kinds))}), so the "
                f"example scores would miss them: {', '.join(missed[:5])}; freeze them (requires_grad=False) or call "
                "the module that owns them."
            )
        weights = sum(parameter.numel() for parameter in self._model.parameters())
        return sum(total.numel() for total in sums.values()) / weights

    def _owned(self) -> list[tuple[nn.Module, str]]:
        return [
            (module, self._names[id(p)])
            for module in self._model.modules()
            for p in module.parameters(recurse=False)
            if id(p) in self._names
        ]

    def by_example(self, values: Tensor, where: str) -> Float[Tensor, "example rest"]:
        """Bring a module's output (any number of dimensions) to one row per example.

        Raises:
            UserError: if the output has neither a batch dimension in front nor flattened tokens.
        """
        if values.shape[0] == self._batch and (values.dim() == 1 or self._tokens in values.shape[1:]):
            return values.reshape(self._batch, -1)
        if values.shape[0] == self._batch * self._tokens:
            return values.reshape(self._batch, -1)
        raise UserError(
            f"The output of {where} has shape {tuple(values.shape)}, which cannot be split into {self._batch} examples "
            f"of {self._tokens} tokens; freeze its parameters (requires_grad=False) to leave it out of the scores."
        )

    def broadcast(self, output: Tensor) -> Tensor:
        """Give an output that is shared by the whole batch (learned positions) a batch dimension of its own."""
        if output.dim() > 2 and output.shape[0] == 1 < self._batch and output.shape[1] == self._tokens:
            return output.expand(self._batch, *output.shape[1:])
        return output

    def add(self, contribution: Float[Tensor, " example"]) -> None:
        """Add one module's share."""
        self._rows = contribution if self._rows is None else self._rows + contribution


class _TapHook:
    """A forward hook that puts a tap on every floating output of one module."""

    def __init__(self, rows: RowSums, path: str, module: nn.Module, tangents: Mapping[str, Tensor]) -> None:
        self._rows, self._tangents = rows, tangents
        self.where = f"{path} ({type(module).__name__})"
        self._product = _PRODUCTS.get(type(module), _general_product)
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
            raise UserError(
                f"{self.where} rescales its weights or gradients, so its gradients have no per-example sum."
            )

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not torch.is_grad_enabled():  # as in the jvp of a module around this one
            return None
        inputs, layout = pytree.tree_flatten((args, kwargs))
        outputs, out_layout = pytree.tree_flatten(output)
        for k, value in enumerate(outputs):
            if isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad:
                call = _Call(self, module, layout, inputs, k)
                tensors = [given for given in inputs if isinstance(given, Tensor)]
                outputs[k] = _Tap.apply(self._rows.broadcast(value), call, *tensors)
                self._rows._tapped.add(id(module))
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

    def __init__(self, hook: _TapHook, module: nn.Module, layout: Any, inputs: list[Any], output: int) -> None:
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
