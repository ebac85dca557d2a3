"""The training of all weights, with what it holds beside them on the device and on the host."""

from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from memory import Meter
from torch import Tensor

from dualsft.models.loading import checkpoint_activations
from dualsft.selection.dense_training import DenseTraining
from dualsft.selection.offload import Offload
from dualsft.selection.warmup import NAMES
from gpu_checks.models import build, full_batches, release, timed
from gpu_checks.section import Figure, Scale

_RATE = 1e-3
"""Large enough that a step changes a bfloat16 weight."""


def warm_up(scale: Scale) -> Iterator[Figure]:
    """Time, peak, and the weights after a few steps, on the device (never) and on the host (always)."""
    weights: dict[Offload, list[Tensor]] = {}
    seconds: dict[Offload, float] = {}
    places: tuple[Offload, ...] = ("never", "always")
    for place in places:
        release(scale.device)
        meter = Meter(scale.device)
        model = build(scale.shapes[0], scale.device).train()
        checkpoint_activations(model)
        meter.restart()
        seconds[place] = _step(model, place, scale)
        yield Figure(f"{place}: step", seconds[place], "s")
        yield Figure(f"{place}: peak", meter.peak() / 2**30, "GiB")
        weights[place] = [weight.detach().cpu() for weight in model.parameters()]
        del model
    yield Figure("always / never: step", seconds["always"] / seconds["never"], "ratio")
    differ = sum(int((a != b).sum()) for a, b in zip(*weights.values(), strict=True))
    yield Figure("always, never: rounded weights that differ", differ / sum(w.numel() for w in weights["never"]))


def _step(model: Any, place: Offload, scale: Scale) -> float:
    """The median time of a step behind the first; the model's weights are the same before it at every call."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.02)
    training = DenseTraining(model, _RATE, 0, NAMES, offload=place)
    batches = full_batches(model, scale.batch_tokens, scale.lengths[0], 1 + scale.rounds)
    steps = training.steps(batches, 1)
    times = [timed(scale.device, lambda: next(steps)) for _ in batches]
    training.close()
    return median(times[1:])
