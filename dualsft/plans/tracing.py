"""What a batch takes beyond what a phase holds: forward and backward of the real code, on fake tensors.

A model's blocks are alike, so that memory and operations are linear in their number: two short models are traced, and
the line through them is drawn to the real depth. The line is drawn for two parts: until the gradient reaches the first
block, when activations of all blocks are alive, and from there on, when all gradients are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dualsft.errors import UserError, first_line
from dualsft.plans.batch import BatchShape
from dualsft.plans.live import LiveBytes, Peak
from dualsft.plans.shape import ModelShape
from dualsft.sharding.shard_model import transformer_blocks

_SHORT = (2, 3)


@dataclass(frozen=True)
class BatchCost:
    """What a batch takes.

    Attributes:
        size: Bytes beyond what was held before it, at the peak.
        logits: Bytes of it in logits, and in tensors of their shape.
        flops: Floating-point operations, recomputation included.
    """

    size: int
    logits: int
    flops: int


Prepare = partial[Callable[[], Any]]
"""Makes what a phase holds for a model, its argument, and returns the function that works on one batch; all other
arguments are given by name, and can be compared."""


def trace(shape: ModelShape, batch: BatchShape, prepare: Prepare) -> BatchCost:
    """The cost of one batch at the model's real depth; the same batch of the same model is traced once.

    Raises:
        UserError: if the model does something on the way that depends on values.
    """
    key = (batch, prepare.func, *sorted(prepare.keywords.items(), key=itemgetter(0)))
    if key not in shape.traced:
        shape.traced[key] = _at_real_depth(shape, batch, prepare)
    return shape.traced[key]


def _at_real_depth(shape: ModelShape, batch: BatchShape, prepare: Prepare) -> BatchCost:
    depths = _SHORT if shape.layers > _SHORT[-1] else (shape.layers,)
    try:
        found = [_trace(shape, batch, prepare, depth) for depth in depths]
    except UserError:
        raise
    except Exception as error:  # of whatever the model's code does with tensors that have no values
        raise UserError(
            f"The model of {shape.folder} cannot be run on shapes alone ({first_line(error)}), so that only a run "
            "shows its memory; lower data.batch_tokens for a first try."
        ) from error
    at = partial(_at_depth, depths=depths, depth=shape.layers)
    parts = [(at([f[0][k].size for f in found]), at([f[0][k].logits for f in found])) for k in range(len(found[0][0]))]
    size, logits = max(parts)
    return BatchCost(max(0, size), max(0, min(logits, size)), at([flops for _, flops in found]))


def _at_depth(values: list[int], depths: tuple[int, ...], depth: int) -> int:
    """The line through the values at one or two depths, at another depth."""
    if len(values) == 1:
        return values[0]
    (first, last), (low, high) = values, depths
    return round(last + (last - first) / (high - low) * (depth - high))


def _trace(shape: ModelShape, batch: BatchShape, prepare: Prepare, depth: int) -> tuple[list[Peak], int]:
    """The peaks of both parts beyond what was held, and the operations, of the second of two batches.

    The first batch finds out where weights are used, as that of a pass does.
    """
    with FakeTensorMode(), LiveBytes(shape.vocabulary) as live:
        layers = None if depth == shape.layers else depth
        model = shape.model(torch.device("cpu"), layers)
        work = prepare(model)
        first_block = transformer_blocks(model)[0] if transformer_blocks(model) else model
        work()
        before = live.now
        live.restart()
        handle = first_block.register_forward_hook(partial(_mark_in_backward, live))
        work()
        handle.remove()
        peaks = [Peak(peak.size - before, peak.logits) for peak in live.peaks[:2]]
        return (peaks if len(peaks) == 2 else [*peaks, *peaks]), live.flops


def _mark_in_backward(live: LiveBytes, _: nn.Module, args: Any, output: Any) -> None:
    value = output[0] if isinstance(output, tuple) else output
    if isinstance(value, Tensor) and value.requires_grad:
        value.register_hook(lambda _: live.mark() if len(live.peaks) < 2 else None)
