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

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dualsft.errors import UserError
from dualsft.tap import TapHook, accumulator_dtype

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
        self.tapped: set[int] = set()

    def __enter__(self) -> "RowSums":
        for path, module in self._model.named_modules():
            own = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
            if own:
                tangents = {n: self._direction[self._names[id(p)]] for n, p in own.items()}
                hook = TapHook(self, path, module, tangents)
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
        covered = {name for module, name in self._owned() if id(module) in self.tapped}
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
