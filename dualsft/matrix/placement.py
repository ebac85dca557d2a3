"""Where each weight is scored: the innermost module whose own forward uses it and whose output splits into examples.

Nearly always that is the module that owns it. But some take a child's weight past the child's forward, as state-space
mixers do their convolution's, and some give out what belongs to no example alone, as experts do that sort tokens. Then
it is a module around: its forward is differentiated by all weights used in it that are not scored further in.

Who uses what is read off the autograd graph of one forward pass. Every module's output is marked in it, so that the
weights reached from there, up to the module's inputs and the marks of its children, are those of its own forward.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dualsft.errors import UserError

Places = dict[nn.Module, set[str]]
"""Module -> names, in the model, of the parameters that are scored there."""


def placements(
    model: nn.Module,
    names: Mapping[int, str],
    splits: Callable[[Tensor, str], None],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Places:
    """Where each parameter is scored, as one forward pass shows; with its owner, if nobody uses it there.

    Args:
        model: The model.
        names: Identity of a parameter -> its name, of all that are scored.
        splits: Raises a UserError for an output, and its module's description, if it cannot be split.
        args: What the model is called with.
        kwargs: What it is called with by keyword.

    Raises:
        UserError: naming a module whose output cannot be split, and nor can that of any module around it.
    """
    observer = _Observer(model, names, splits)
    with _requiring(model, names), observer:
        model(*args, **kwargs)
    places = observer.places
    for outer, here in list(places.items()):
        for inner in outer.modules():
            if inner is not outer and inner in places:
                places[inner] -= here  # the outer forward's derivative has that use in it
    seen = {name for here in places.values() for name in here}
    for module in set(model.modules()) - observer.unsplit:  # may be used another time, as an expert without tokens
        places[module] |= {names[id(p)] for p in module.parameters(recurse=False) if id(p) in names} - seen
    return {module: here for module, here in places.items() if here}


@contextmanager
def _requiring(model: nn.Module, names: Mapping[int, str]) -> Iterator[None]:
    """All scored parameters in the graph, also where a pass for rows alone has frozen them."""
    frozen = [p for p in model.parameters() if id(p) in names and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


class _Mark(torch.autograd.Function):
    """The identity, whose node is where a module's output begins."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]


class _Observer:
    """Hooks on all modules that see what the forward of each uses; a context."""

    def __init__(self, model: nn.Module, names: Mapping[int, str], splits: Callable[[Tensor, str], None]) -> None:
        self.places: Places = defaultdict(set)
        self._names, self._splits = names, splits
        self._within = {m: {names[id(p)] for p in m.parameters() if id(p) in names} for m in model.modules()}
        self._paths = {module: path for path, module in model.named_modules()}
        self.unsplit: set[nn.Module] = set()
        self._calls: list[_Observed] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "_Observer":
        for module in self._paths:
            self._handles += [
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, prepend=True),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.append(_Observed([x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]))

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call = self._calls.pop()
        leaves, layout = pytree.tree_flatten(output)
        outputs = {k: x for k, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad}
        used = call.deferred | self._used(list(outputs.values()), call)
        error = self._refusal(module, call, list(outputs.values())) if self._within[module] else None
        if error is not None:
            self.unsplit.add(module)
        here = used & self._within[module] if error is None else set()
        self.places[module] |= here
        self._leave(used - here, call, error)
        for k, value in outputs.items():
            leaves[k] = _Mark.apply(value)
        return pytree.tree_unflatten(leaves, layout)

    def _used(self, outputs: list[Tensor], call: "_Observed") -> set[str]:
        """Names of the parameters from which these outputs, and the inputs of children, are made inside the call."""
        found = {self._names[id(x)] for x in outputs if id(x) in self._names}
        seen, todo = set(call.boundary), [x.grad_fn for x in outputs] + list(call.inner)
        while todo:
            node: Any = todo.pop()
            if node is None or node in seen or node.name() == "_MarkBackward":
                continue
            seen.add(node)
            if (leaf := id(getattr(node, "variable", None))) in self._names:
                found.add(self._names[leaf])
            todo += [before for before, _ in node.next_functions]
        return found

    def _refusal(self, module: nn.Module, call: "_Observed", outputs: list[Tensor]) -> UserError | None:
        """Why no tap can be put on these outputs, if none can."""
        where = f"{self._paths[module]} ({type(module).__name__})"
        if call.modified:
            return UserError(f"{where} modifies its input in place, so it cannot be scored; freeze its parameters.")
        try:
            for value in outputs:
                self._splits(value, where)
        except UserError as error:
            return error
        return None

    def _leave(self, names: set[str], call: "_Observed", error: UserError | None) -> None:
        """Leave parameters, and the making of the call's inputs, to the module around it."""
        if self._calls:
            outer = self._calls[-1]
            outer.inner |= call.boundary
            outer.deferred |= names
            outer.error = outer.error or call.error or error
        elif names:
            raise call.error or error or UserError(f"The use of {', '.join(sorted(names)[:5])} cannot be followed.")


class _Observed:
    """One call of a module in progress.

    Attributes:
        boundary: The nodes that its inputs come from.
        inner: Those that its children's inputs come from.
        deferred: The parameters that its children have left to it.
        error: Why.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        self._inputs, self._versions = inputs, [x._version for x in inputs]
        self.boundary = {x.grad_fn for x in inputs if x.grad_fn is not None}
        self.inner: set[Any] = set()
        self.deferred: set[str] = set()
        self.error: UserError | None = None

    @property
    def modified(self) -> bool:
        """Whether an input has been modified in place since."""
        return [x._version for x in self._inputs] != self._versions
