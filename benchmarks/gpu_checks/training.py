"""Steps of masked fine-tuning beside dense ones and LoRA, and where a step's time goes."""

import importlib.util
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

from masked_fit import masked, step_times
from scoring import flops
from torch import Tensor

from dualsft.data.layout import Batch
from dualsft.models.loading import checkpoint_activations
from dualsft.objectives import example_losses
from gpu_checks.machine import peak_speed
from gpu_checks.models import build, count, full_batches, release, timed
from gpu_checks.section import Figure, Scale

_CASES = ("dense", "dense, bf16", "scattered 0.1", "rows 0.1", "blocks 0.1", "LoRA 0.01")


def steps(scale: Scale) -> Iterator[Figure]:
    """A step of each kind beside the dense one in the same round."""
    release(scale.device)
    cases = [case for case in _CASES if "LoRA" not in case or importlib.util.find_spec("peft")]
    options = Namespace(
        shape=scale.shapes[0],
        device=scale.device,
        checkpointing=True,
        tokens=scale.lengths[0],
        batch_tokens=scale.batch_tokens,
        rounds=scale.rounds,
    )
    for case, found in step_times(cases, options).items():
        yield Figure(
            f"{case}: step" if case == "dense" else f"{case} / dense", found, "s" if case == "dense" else "ratio"
        )


def step_parts(scale: Scale) -> Iterator[Figure]:
    """Forward, backward with the gather, and optimizer with the scatter, of a step on a tenth of the weights."""
    model = build(scale.shapes[1], scale.device).train()
    checkpoint_activations(model)
    training = masked(model, "scattered", 0.1)
    (batch,) = full_batches(model, scale.batch_tokens, scale.lengths[1], 1)
    parts: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}
    for _ in range(1 + scale.rounds):
        losses: list[Tensor] = []
        parts["forward"].append(timed(scale.device, partial(_forward, model, batch, losses)))
        parts["backward"].append(timed(scale.device, losses[0].backward))
        parts["optimizer"].append(timed(scale.device, training.optimizer.step))
        training.optimizer.zero_grad(set_to_none=True)
    seconds = {name: median(found[1:]) for name, found in parts.items()}
    total = sum(seconds.values())
    yield Figure(f"step of {scale.shapes[1]}", total, "s")
    used = flops(model, batch["input_ids"].numel(), scale.lengths[1], checkpointing=False)
    yield Figure("step: MFU", used / total / peak_speed(scale))
    for name, found in seconds.items():
        yield Figure(name, found / total, "of the step")
    yield Figure("optimizer, for each trained weight", seconds["optimizer"] / training.trained * 1e9, "ns")
    yield Figure("trained", training.trained / count(model), "of the weights")


def _forward(model: Any, batch: Batch, losses: list[Tensor]) -> None:
    """Add the batch's mean loss to the list."""
    losses.append(example_losses(model, batch).mean())
