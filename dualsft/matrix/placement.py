"""Where each weight is scored: in the innermost module whose own forward uses it and whose output splits into examples.

Nearly always that is the module that owns the weight. There are two exceptions. Some modules use a child's weight
without calling the child, as state-space mixers do with their convolution. And the outputs of some do not split into
examples, as those of experts that sort tokens. Then an enclosing module is tapped, and its forward is differentiated
with respect to all weights used in it that are not scored in a module inside it.

Which module uses which weight is read off the autograd graph of one forward pass. Every module's output is marked in
it, so that the weights reached from there, up to the module's inputs and its children's marks, are its forward's own.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dualsft.errors import UserError

Placement = dict[nn.Module, set[str]]
"""Module -> names, in the model, of the parameters that are scored there."""


def find_placement(
    model: nn.Module,
    names: Mapping[int, str],
    check_output: Callable[[Tensor, str], None],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Placement:
    """Find where each parameter is scored, by one forward pass of these arguments.

    ``names`` has the name of each scored parameter by its identity. ``check_output`` raises a UserError for an output
    that cannot be split; it also gets the module's name and type.

    Raises:
        UserError: if neither a module's output can be split nor that of any module around it.
    """
    observer = _Observer(model, names, check_output)
    parameters = [p for p in model.parameters() if id(p) in names]
    with requires_grad(parameters, True), observer:  # in a pass for rows alone they do not
        model(*args, **kwargs)
    placement = observer.placement
    # 1. A weight that an enclosing module's derivative covers is not scored inside that module again.
    for outer, scored in list(placement.items()):
        for inner in outer.modules():
            if inner is not outer and inner in placement:
                placement[inner] -= scored
    # 2. Unused parameters are scored in their owner: another batch may use them, as that of an expert without tokens.
    seen = {name for scored in placement.values() for name in scored}
    for module in set(model.modules()) - observer.unsplit:
        placement[module] |= {names[id(p)] for p in module.parameters(recurse=False) if id(p) in names} - seen
    return {module: scored for module, scored in placement.items() if scored}


@contextmanager
def requires_grad(parameters: Iterable[Tensor], value: bool) -> Iterator[None]:
    """Set ``requires_grad`` of some parameters while the context is open."""
    changed = [parameter for parameter in parameters if parameter.requires_grad != value]
    for parameter in changed:
        parameter.requires_grad_(value)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(not value)


class _Mark(torch.autograd.Function):
    """The identity; its node in the autograd graph marks a module's output."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]


class _Observer:
    """Hooks on all modules that find which parameters the forward of each uses, while the context is open.

    Attributes:
        placement: The modules with the parameters that they use themselves, as far as their outputs split.
        unsplit: The modules whose outputs do not split.
    """

    def __init__(self, model: nn.Module, names: Mapping[int, str], check_output: Callable[[Tensor, str], None]) -> None:
        self.placement: Placement = defaultdict(set)
        self._names, self._check_output = names, check_output
        self._within = {m: {names[id(p)] for p in m.parameters() if id(p) in names} for m in model.modules()}
        self._paths = {module: path for path, module in model.named_modules()}
        self.unsplit: set[nn.Module] = set()
        self._calls: list[_ObservedCall] = []
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
        self._calls.append(_ObservedCall([x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]))

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call = self._calls.pop()
        leaves, structure = pytree.tree_flatten(output)
        outputs = {k: x for k, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad}
        # 1. Parameters that the module uses, and those that its children could not score.
        used = call.deferred | self._used(list(outputs.values()), call)
        # 2. Parameters scored here: those inside the module, if its outputs split.
        error = self._refusal(module, call, list(outputs.values())) if self._within[module] else None
        if error is not None:
            self.unsplit.add(module)
        scored = used & self._within[module] if error is None else set()
        self.placement[module] |= scored
        # 3. The rest is for the enclosing module, which sees this one's outputs marked.
        self._defer(used - scored, call, error)
        for k, value in outputs.items():
            leaves[k] = _Mark.apply(value)
        return pytree.tree_unflatten(leaves, structure)

    def _used(self, outputs: list[Tensor], call: "_ObservedCall") -> set[str]:
        """Names of the parameters that these outputs, and the inputs of children, depend on inside the call."""
        used = {self._names[id(x)] for x in outputs if id(x) in self._names}
        seen, todo = set(call.boundary), [x.grad_fn for x in outputs] + list(call.inner)
        while todo:
            node: Any = todo.pop()
            if node is None or node in seen or node.name() == "_MarkBackward":
                continue
            seen.add(node)
            if (leaf := id(getattr(node, "variable", None))) in self._names:
                used.add(self._names[leaf])
            todo += [before for before, _ in node.next_functions]
        return used

    def _refusal(self, module: nn.Module, call: "_ObservedCall", outputs: list[Tensor]) -> UserError | None:
        """Why these outputs cannot be tapped; None if they can."""
        where = f"{self._paths[module]} ({type(module).__name__})"
        if [x._version for x in call.inputs] != call.versions:
            return UserError(f"{where} modifies its input in place, so it cannot be scored; freeze its parameters.")
        try:
            for value in outputs:
                self._check_output(value, where)
        except UserError as error:
            return error
        return None

    def _defer(self, names: set[str], call: "_ObservedCall", error: UserError | None) -> None:
        """Hand parameters, and the graph behind the call's inputs, on to the enclosing module."""
        if self._calls:
            outer = self._calls[-1]
            outer.inner |= call.boundary
            outer.deferred |= names
            outer.error = outer.error or call.error or error
        elif names:
            raise call.error or error or UserError(f"The use of {', '.join(sorted(names)[:5])} cannot be followed.")


class _ObservedCall:
    """One call of a module in progress.

    Attributes:
        boundary: The nodes of the graph that its inputs come from.
        inner: Those that its children's inputs come from.
        deferred: The parameters that its children use but cannot score.
        error: Why they cannot.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        self.inputs, self.versions = inputs, [x._version for x in inputs]
        self.boundary = {x.grad_fn for x in inputs if x.grad_fn is not None}
        self.inner: set[Any] = set()
        self.deferred: set[str] = set()
        self.error: UserError | None = None
