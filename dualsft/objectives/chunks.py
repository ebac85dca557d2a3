"""Values of supervised tokens that come from their logits, without the logits of all tokens at once.

    f(logits_t)  of each supervised token t,     logits_t = tail(h_t),     h = body(batch)

With a large vocabulary logits are the largest tensors of a batch, in float32 several times over. So the tail is run on
supervised tokens alone, as many at a time as have `LARGEST` bytes of logits, and chunks are computed again in backward,
but for the last ones, which it needs first: one of them costs no memory, and further ones save time for what they take.
Where the logits of all tokens are as small as one chunk, the model is called as usual.

Losses and gradients are the same sums, so that they differ by rounding alone. With bfloat16 weights the head's gradient
is rounded after each chunk, which adds to its error.

Fused kernels for this (Liger, cut cross-entropy) compute the head's gradient themselves, so that a tap would see none.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dualsft.data.layout import Batch, Layout
from dualsft.data.partial_layout import PartialLayout
from dualsft.models import PreTrainedModel
from dualsft.objectives.inputs import model_inputs
from dualsft.objectives.supervised import Supervised
from dualsft.objectives.tail import Tail, body_path

LARGEST = 2**28
"""Bytes of float32 logits that are computed at a time; a loss takes two tensors of that size in backward."""

KEPT = 2**29
"""Bytes of logits that are kept for backward where they are all that a value needs there, as cross-entropy does."""

Values = Callable[[Float[Tensor, "chunk vocabulary"], slice, list[Tensor] | None], Tensor]
"""f: logits of some supervised tokens, in the model's type, and the place among all of these -> values of each.

Where it is called again with the same logits, for gradients, the list is the one of the first call, for what it may
want to keep; else it is None."""


def supervised_values(
    model: PreTrainedModel,
    batch: Batch,
    supervised: Supervised,
    values: Values,
    layout: Layout | None = None,
    kept: int = 0,
) -> Tensor:
    """The values of each supervised token, row by row.

    Args:
        model: The model.
        batch: Padded or packed, on the model's device.
        supervised: Its supervised tokens.
        values: f.
        layout: The batch's, for taps on the head.
        kept: Bytes of logits, in the model's type, that are not computed again; at least the last chunk is not.
    """
    inputs, chunk = model_inputs(model, batch), tokens_at_once(model)
    if batch["labels"].numel() > chunk and body_path(model):
        with _forward_replaced(model, _Chunked(model, supervised, values, layout, chunk, kept).forward):
            output = model(**inputs)
        if isinstance(output, dict) and "values" in output:
            return output["values"]
    else:
        output = model(**inputs)
    logits = supervised.pick(output.logits)
    del output  # with the logits of all tokens
    return values(logits, slice(None), None)


def tokens_at_once(model: PreTrainedModel) -> int:
    """As many tokens as have `LARGEST` bytes of float32 logits."""
    return max(1, LARGEST // (4 * int(model.config.get_text_config().vocab_size)))


@contextmanager
def _forward_replaced(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a model's forward within its hooks: those of FSDP2 gather the weights of body and tail around it."""
    model.forward = forward
    try:
        yield
    finally:
        del model.forward


@dataclass(frozen=True)
class _Chunked:
    """The forward of a model that returns values of supervised tokens; the arguments are `supervised_values`' own.

    Attributes:
        chunk: Tokens whose logits are computed at a time.
        kept: Bytes of logits that are not computed again.
    """

    model: PreTrainedModel
    supervised: Supervised
    values: Values
    layout: Layout | None
    chunk: int
    kept: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The values by the name ``values``; what the model's own forward returns if it turns out to have no tail."""
        tail = Tail(self.model, args, kwargs)
        return {"values": self._in_chunks(tail)} if tail.run_body() else tail.whole()

    def _in_chunks(self, tail: Tail) -> Tensor:
        hidden, places = self.supervised.pick(tail.hidden), self.supervised.before
        recomputed = len(hidden) - self._tokens_kept(hidden) if torch.is_grad_enabled() else 0
        again = partial(checkpoint, self._of_chunk, use_reentrant=False)
        firsts = range(0, max(len(hidden), 1), self.chunk)
        chunks = zip(hidden.split(self.chunk), places.split(self.chunk), firsts, strict=True)
        return torch.cat(
            [again(tail, *chunk, []) if chunk[-1] < recomputed else self._of_chunk(tail, *chunk) for chunk in chunks]
        )

    def _tokens_kept(self, hidden: Tensor) -> int:
        """The chunks that begin among the last so many tokens are not computed again."""
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        return max(self.chunk, self.kept // (hidden.itemsize * vocabulary))

    def _of_chunk(
        self, tail: Tail, hidden: Tensor, places: Int[Tensor, " token"], first: int, kept: list[Tensor] | None = None
    ) -> Tensor:
        part = nullcontext() if self.layout is None else self.layout.holding(PartialLayout(self.layout, places))
        with part:
            logits = tail.logits(hidden)
        return self.values(logits, slice(first, first + len(hidden)), kept)
