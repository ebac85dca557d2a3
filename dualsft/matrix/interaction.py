"""The interaction matrix, on one page.

    M_ij = g_ij u_j,     g_i = ∇ l_i(θ),     u = a direction in weight space, chosen by a scorer

    data utility           φ_i = Σ_j M_ij = <u, g_i>          row sums:     `RowSums`
    parameter importance   φ_j = Σ_i M_ij = u_j Σ_i g_ij      column sums:  `ColumnSums`
    Σ_i φ_i = Σ_j φ_j                                         the sum identity, an end-to-end check of both

Source: Chen, Yang, Wu, "One Algorithm, Two Goals: Dual Scoring for Parameter and Data Selection in LLM Fine-Tuning",
arXiv 2605.06166. M has (examples x weights) entries and is never formed; neither is any g_i. Both sums come from one
ordinary backward pass over a batch of examples:

*Rows.* Let f be a module whose own forward uses parameters w, nearly always those that it owns (`placement.py`),
y = f(w, a) its output and e = ∂(Σ_i l_i)/∂y the gradient that backward brings. Its share of <u, g_i> is the local
Jacobian-vector product (∂f/∂w) u_w dotted with e, over the outputs that belong to example i. Summed over all modules
this is exact, and a tied weight counts once per use, as it must. For Linear the product is a Uᵀ, for Embedding U[id],
and for anything else `torch.func.jvp` of the module's own forward (`tap.py`). Where the columns are wanted too, Linear
has a shorter way to the same number (`linear_tap.py`).

*Columns.* The weight gradients of Σ_i l_i are Σ_i g_i already; each is folded into a float32 sum and dropped as soon as
it is complete, so that one layer's dense gradient lives at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dualsft.data.layout import AmbiguousShapeError, Layout
from dualsft.errors import UserError
from dualsft.matrix.linear_tap import LinearHook
from dualsft.matrix.placement import Places, placements
from dualsft.matrix.tap import TapHook
from dualsft.models.dtypes import accumulator_dtype
from dualsft.models.linear import is_linear
from dualsft.sharding.shard_model import is_sharded
from dualsft.sharding.shards import compute_device, local_shard
from dualsft.sharding.unit_gather import unsharded_parameters

Direction = Mapping[str, Tensor]
"""Parameter name -> u, of the parameter's shape."""


class ColumnSums:
    """Σ_i g_i of every trainable parameter, accumulated over all backward passes while the context is open.

    Args:
        model: Any module.
        squared: Whether to sum the squares of the entries instead; a backward pass must then be one example's.

    Attributes:
        squared: Whether the squares are summed.
        sums: Parameter name -> sum of gradients, of the parameter's shape, in float32 (float64 for float64 weights).
    """

    def __init__(self, model: nn.Module, squared: bool = False) -> None:
        self.squared = squared
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._whole = unsharded_parameters(model) if squared and is_sharded(model) else {}
        self.sums = {
            n: torch.zeros_like(local_shard(p), dtype=accumulator_dtype(p)) for n, p in self._parameters.items()
        }
        self._handles: list[RemovableHandle] = []
        self._finite: list[Tensor] = []

    def __enter__(self) -> "ColumnSums":
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._folder(name))
            for name, parameter in self._parameters.items()
        ]
        # a sharded model's gradients are added up over the ranks before they are folded
        self._handles += [p.register_post_accumulate_grad_hook(_square) for p in self._whole.values()]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter in self._parameters.values():  # what an error has left half done
            parameter.grad = None

    def _folder(self, name: str) -> Callable[[Tensor], None]:
        def fold(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = local_shard(parameter.grad)
            if gradient.numel():
                self._finite.append(torch.stack(torch.aminmax(gradient)).isfinite().all())  # NaN is either
            if self.squared and not self._whole:
                self.sums[name].addcmul_(wide := gradient.to(self.sums[name].dtype), wide)
            else:
                self.sums[name].add_(gradient)
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


def _square(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.square_()


class RowSums:
    """<u, g_i> of every example of the batch in flight, from taps on the modules' outputs while the context is open.

    Use: ``with RowSums(model, [u]) as rows: rows.begin(layout); losses(batch).sum().backward(); phi = rows.read()[0]``.

    Args:
        model: Any module; where each parameter is scored is seen at its first forward pass.
        directions: One u or more, each for every parameter that is scored.
        by_token: Whether to keep contributions by token too.

    Attributes:
        directions: One u or more, each for every parameter that is scored.
        layout: Of the batch in flight.
        by_token: Whether contributions are kept by token.
        anchor: A number that requires a gradient, so that backward reaches a tap on the output of frozen weights.
    """

    def __init__(self, model: nn.Module, directions: Sequence[Direction], by_token: bool = False) -> None:
        self._model = model
        self.directions = directions
        both = (*model.named_parameters(), *unsharded_parameters(model).items())
        self._names = {id(p): name for name, p in both if name in directions[0]}
        self._handles: list[RemovableHandle] = []
        self._paths = {module: path for path, module in model.named_modules()}
        self._places: Places | None = None
        self._tapped: set[int] = set()
        self.by_token = by_token
        self.anchor = torch.zeros((), device=compute_device(model), requires_grad=True)
        self.layout = Layout(0, 0, ())
        self._examples: dict[int, Tensor] = {}
        self._tokens: dict[int, Tensor] = {}
        self._refusals: list[AmbiguousShapeError | UserError] = []
        self._complete = False

    def __enter__(self) -> "RowSums":
        self._handles = [self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True)]
        self._tap()
        return self

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See, at the first forward pass, where each parameter is to be scored."""
        if self._places is None and torch.is_grad_enabled():
            self._places = {}  # the observed pass does not ask again
            try:
                self._places = placements(model, self._names, self._expect_some, args, kwargs)
            except BaseException:
                self._places = None
                raise
            self._tap()

    def _tap(self) -> None:
        for module, here in (self._places or {}).items():
            own = module.named_parameters(remove_duplicate=False)
            names = {n: self._names[id(p)] for n, p in own if self._names.get(id(p)) in here}
            tangents = [_Renamed(u, names) for u in self.directions]
            kind = LinearHook if is_linear(module) and "weight" in names else TapHook
            hook = self._noting(kind(self, self._paths[module], module, tangents))
            # before any hook of somebody else's: the output must still be the module's own
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))

    def _noting(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook, whose refusal is kept until the forward pass is over, which other ranks may be in too."""

        def noting(*given: Any) -> Any:
            try:
                return hook(*given)
            except (AmbiguousShapeError, UserError) as error:
                self._refusals.append(error)
                return None

        return noting

    def check(self) -> None:
        """See, after the forward pass, that every output could be split.

        Raises:
            AmbiguousShapeError: if a wider batch would have to be taken.
            UserError: naming a module whose output cannot be split.
        """
        if self._refusals:
            raise next((error for error in self._refusals if isinstance(error, UserError)), self._refusals[0])

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, layout: Layout) -> None:
        """Forget the last batch and expect one of this layout."""
        self.layout, self._examples, self._tokens, self._complete = layout, {}, {}, False
        self._refusals = []

    def complete(self) -> None:
        """Say that the batch's backward has run, also where none of the weights that are scored took part in it."""
        self._complete = True

    def read(self) -> Float[Tensor, "direction example"]:
        """<u, g_i> of the batch whose backward has run, in the order of its layout.

        Raises:
            RuntimeError: if none has.
            AmbiguousShapeError, UserError: see `check`.
        """
        self.check()
        if not (self._complete or self._examples or self._tokens):
            raise RuntimeError("no backward pass has run since begin()")
        shape = (len(self.directions), len(self.layout.spans))
        rows = torch.zeros(shape, dtype=torch.float64, device=self.anchor.device)
        for k, values in self._examples.items():
            rows[k] += values
        for k in self._tokens:
            rows[k] += self.read_tokens(k).sum(1)
        return rows

    def read_tokens(self, k: int = 0) -> Float[Tensor, "example longest"]:
        """The contributions of each token's forward and backward quantities, which add up to <u, g_i> of the k-th u.

        Token t of an example stands for every use of a weight at that place: all that it fed forward, weighted with
        the gradient that came back to it.
        """
        if k not in self._tokens:
            return self.layout.by_example(torch.zeros(self.layout.rows, self.layout.tokens, device=self.anchor.device))
        return self.layout.by_example(self._tokens[k])

    @property
    def covered(self) -> set[str]:
        """Names of the parameters that have been scored, each where it is used, since the context was opened."""
        places = self._places or {}
        return {name for module, here in places.items() if id(module) in self._tapped for name in here}

    def expect(self, shape: torch.Size, where: str) -> None:
        """See, before backward, that an output of this shape can be split into examples.

        Raises:
            AmbiguousShapeError: if the token axis is needed and cannot be told.
            UserError: naming the module, if it cannot be split.
        """
        if self._splits_tokens:
            self.layout.token_axis(shape, where)
        else:
            self.layout.check_rows(shape, where)

    def _expect_some(self, output: Tensor, where: str) -> None:
        """See that an output can be split; that its token axis is in doubt at this width alone is no refusal."""
        try:
            self.expect(self.layout.expand(output).shape, where)
        except AmbiguousShapeError:
            if self.layout.rows == self.layout.tokens:
                raise

    @property
    def _splits_tokens(self) -> bool:
        return self.by_token or not self.layout.one_per_row

    def touch(self, module: nn.Module) -> None:
        """Note that this module takes part."""
        self._tapped.add(id(module))

    def add(self, k: int, x: Tensor, y: Tensor, where: str) -> None:
        """Add to the rows of the k-th u the products x · y of two tensors of one module's output, or input, shape."""
        wide = accumulator_dtype(x)
        if self._splits_tokens:
            x, y = self.layout.by_token(x, where), self.layout.by_token(y, where)
            values = (x.to(wide) * y.to(wide)).sum(2).double()
            self._tokens[k] = self._tokens[k].add_(values) if k in self._tokens else values
        else:
            x, y = (part.reshape(self.layout.rows, -1).to(wide) for part in (x, y))
            self.add_examples(k, (x * y).sum(1))

    def add_examples(self, k: int, values: Float[Tensor, " example"]) -> None:
        """Add one number per example to the rows of the k-th u; all are added up in float64."""
        values = values.double()
        self._examples[k] = self._examples[k].add_(values) if k in self._examples else values


class _Renamed(Mapping[str, Tensor]):
    """A direction under a module's own names for its parameters, taken when it is asked for."""

    def __init__(self, direction: Direction, names: Mapping[str, str]) -> None:
        self._direction, self._names = direction, names

    def __getitem__(self, name: str) -> Tensor:
        return self._direction[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def check_covered(model: nn.Module, covered: Iterable[str], moved: Iterable[str]) -> None:
    """See that every parameter with a gradient is one that the rows cover.

    Args:
        model: The model.
        covered: Names of the parameters whose module has been tapped.
        moved: Names of the parameters whose gradient is not zero.

    Raises:
        UserError: naming the parameters that take part in the loss outside the forward of the module that owns them,
            where no tap can see them.
    """
    known = set(covered)
    missed = [name for name in moved if name not in known]
    if missed:
        kinds = {type(model.get_submodule(n.rpartition(".")[0])).__name__ for n in missed}
        raise UserError(
            f"These parameters are used outside their own module's forward ({', '.join(sorted(kinds))}), so the "
            f"example scores would miss them: {', '.join(missed[:5])}; freeze them (requires_grad=False) or call "
            "the module that owns them."
        )


@contextmanager
def paused(*contexts: AbstractContextManager[Any] | None) -> Iterator[None]:
    """Close these contexts, which sum what backward brings, for as long as this inner one is open."""
    given = [context for context in contexts if context is not None]
    for context in given:
        context.__exit__(None, None, None)
    try:
        yield
    finally:
        for context in given:
            context.__enter__()
