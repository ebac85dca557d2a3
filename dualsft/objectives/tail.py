"""What a causal language model does behind its body, by itself: hidden states of tokens -> their logits.

That is the head, and whatever scales or caps logits around it. A tail is the model's own forward, in which a stand-in
for the body returns given hidden states; so it is right for any model whose forward calls its body once and goes on
token by token, which is checked once by comparing. Hooks of the head run at each call, as they do otherwise.
"""

from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dualsft.errors import is_out_of_memory
from dualsft.models import PreTrainedModel
from dualsft.objectives.inputs import same_but_for_rounding
from dualsft.sharding.unit_gather import units

_COMPARED = 4
"""Tokens whose logits are compared."""

_BODIES: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""Model -> the path of its body; empty if it has none with a tail behind it."""

_COMPARED_MODELS: WeakSet[Any] = WeakSet()


def body_path(model: PreTrainedModel) -> str:
    """Where a model's body is, as far as its structure and an earlier comparison tell; empty if it has no tail."""
    if model not in _BODIES:
        body, head = model.get_decoder(), model.get_output_embeddings()
        paths = [path for path, module in model.named_modules() if module is body and path]
        # taps on the model itself, and hooks of sharded units in the tail, would have to know of its parts
        bound = next(model.parameters(recurse=False), None) is not None or "forward" in vars(model)
        inside = {model, *body.modules()}
        found = bool(paths) and head is not None and not bound and set(units(model)) <= inside
        _BODIES[model] = paths[0] if found else ""
    return _BODIES[model]


def trust_tail(model: PreTrainedModel) -> None:
    """Take it that a model goes on token by token behind its body, where there are no values to compare."""
    _COMPARED_MODELS.add(model)


class Tail:
    """The tail of a model, within one call of it.

    Args:
        model: The model, which has a `body_path`.
        args: The arguments of the call.
        kwargs: Those by name.
    """

    def __init__(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        path = body_path(model)
        self._model, self._stand_in = model, _StandIn(model.get_submodule(path))
        self._with_stand_in: Any = _With(model, path.split("."), self._stand_in)
        self._args, self._kwargs = args, kwargs

    def run_body(self) -> bool:
        """Call the body; whether the tail can be run on tokens of it, which is found out at the model's first call."""
        known = self._model in _COMPARED_MODELS
        try:
            found = self._stand_in.calls_body(self._with_stand_in, self._args, self._kwargs)
            separable = found and (known or self._is_by_token())
        except Exception as error:  # whatever the model's code raises when run in another way than it was written for
            if known or self._stand_in.fails or is_out_of_memory(error):
                raise
            separable = False
        _COMPARED_MODELS.add(self._model)
        if not separable:
            _BODIES[self._model] = ""
        return separable

    @property
    def hidden(self) -> Float[Tensor, "row token channel"]:
        """The hidden states that the body returned."""
        return self._stand_in.hidden

    def logits(self, hidden: Float[Tensor, "token channel"]) -> Float[Tensor, "token vocabulary"]:
        """The logits of some tokens, each of which is a row of its own."""
        self._stand_in.replaced = hidden[:, None]
        return self._logits()[:, 0]

    def whole(self) -> Any:
        """What the model's forward returns; the body is not called again."""
        if self._stand_in.output is None:
            return type(self._model).forward(self._model, *self._args, **self._kwargs)
        self._stand_in.replaced = self.hidden
        return self._with_stand_in(*self._args, **self._kwargs)

    def _logits(self) -> Tensor:
        calls = self._stand_in.calls
        logits: Tensor = self._with_stand_in(*self._args, **self._kwargs).logits
        if self._stand_in.calls != calls + 1:
            raise RuntimeError("the forward does not call its body once")
        return logits

    @torch.no_grad()
    def _is_by_token(self) -> bool:
        """Whether the first tokens have the same logits each by itself as in the first row, with the head in use."""
        of_batch, hidden = self.hidden.shape[:2], self.hidden[0, :_COMPARED]
        if self._args or self._kwargs["input_ids"].shape != of_batch:
            return False
        calls: list[None] = []
        handle = self._model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(None))
        try:
            alone = self.logits(hidden)
        finally:
            handle.remove()
        given, self._stand_in.replaced = self._kwargs, hidden[None]
        self._kwargs = {n: v[:1, : len(hidden)] if _per_token(v, of_batch) else v for n, v in given.items()}
        try:
            return bool(calls) and same_but_for_rounding(self._model, self._logits()[0], alone)
        finally:
            self._kwargs = given


def _per_token(value: Any, of_batch: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape == of_batch


class _BodyDone(Exception):  # noqa: N818
    """Leaves a forward behind its body."""


class _StandIn:
    """Takes the place of a body: calls it the first time, and then returns other hidden states in its output.

    Attributes:
        output: What the body returned.
        fails: Whether the body was called and has raised.
        replaced: The hidden states to return.
        calls: How often they were.
    """

    output: Any = None
    hidden: Tensor
    replaced: Tensor

    def __init__(self, body: nn.Module) -> None:
        self._body, self.fails, self.calls = body, False, 0

    def calls_body(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a forward in which the body is replaced by this calls it; it is left there."""
        try:
            forward(*args, **kwargs)
        except _BodyDone:
            return True
        return False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.output is None:
            self.fails = True
            self.output = self._body(*args, **kwargs)
            self.hidden, self.fails = self.output.last_hidden_state, False
            raise _BodyDone
        self.calls += 1
        return type(self.output)(**{**self.output, "last_hidden_state": self.replaced})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


class _With:
    """A module whose forward finds something else in place of one of the modules inside it."""

    def __init__(self, module: nn.Module, path: list[str], other: Any) -> None:
        inner = other if len(path) == 1 else _With(getattr(module, path[0]), path[1:], other)
        vars(self).update(_module=module, _name=path[0], _inner=inner)

    def __getattr__(self, name: str) -> Any:
        return self._inner if name == self._name else getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, without its hooks."""
        return type(self._module).forward(self, *args, **kwargs)

    __call__ = forward
