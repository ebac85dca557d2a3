"""How long passes and steps take beside a plain forward and backward pass, and what compiling them gains."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from masked_fit import masked
from scoring import compare, flops, plain_pass

from dualsft.matrix.calibration import measured_break_even
from dualsft.matrix.curvature import HessianVectorProduct, twice_differentiable
from dualsft.matrix.linear_tap import settle_break_even
from dualsft.matrix.passes import gradient_pass
from dualsft.objectives import SelfDistillation, example_losses
from dualsft.selection.passes import scoring_mode
from dualsft.training.compilation import compile_blocks
from gpu_checks.machine import peak_speed
from gpu_checks.models import build, full_batches, second_alone, small_direction, timed, wait
from gpu_checks.section import Figure, Scale


def scoring(scale: Scale) -> Iterator[Figure]:
    """The one pass of first-order scoring and the row pass of second-order scoring, beside plain passes."""
    speed = peak_speed(scale)
    measured = measured_break_even(torch.device(scale.device), torch.bfloat16) if scale.cuda else None
    if measured is not None:  # as a selection does
        settle_break_even(scale.device, measured)
        yield Figure("break-even, a large layer", measured.tokens, "tokens")
        yield Figure("break-even, calls", measured.calls, "weights x tokens")
    for shape, checkpointing in ((scale.shapes[0], False), (scale.shapes[1], True)):
        model = build(shape, scale.device)
        u = small_direction(model)
        for length in scale.lengths:
            batches = full_batches(model, scale.batch_tokens, length, 3)
            with scoring_mode(model, checkpointing):
                times = compare(model, batches, [u], scale.rounds)
            case = f"{shape}, {length} tokens{', recomputed' if checkpointing else ''}"
            yield Figure(f"plain pass, {case}", times["plain"], "s")
            used = flops(model, batches[0]["input_ids"].numel(), length, checkpointing=False)
            yield Figure(f"plain pass, {case}: MFU", used / times["plain"] / speed)
            yield Figure(f"one pass / plain, {case}", times["one pass"], "ratio")
            yield Figure(f"row pass / plain, {case}", times["row pass"], "ratio")
            yield Figure(f"first batch, more than others, {case}", times["first batch"], "plain passes")
        del model, u


def phases(scale: Scale) -> Iterator[Figure]:
    """A batch of each phase of a selection, in plain passes of the same batch."""
    model = build(scale.shapes[0], scale.device)
    batches = full_batches(model, scale.batch_tokens // 2, scale.lengths[0], 2)
    plain = median(timed(scale.device, partial(plain_pass, model, batches[1])) for _ in range(1 + scale.rounds))
    yield Figure("plain pass", plain, "s")
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "loss alone": dict,
        "validation gradient": dict,
        "prior gradient": lambda: {"losses": _distilled(model)},
        "scores: rows and columns": lambda: {"directions": [small_direction(model)]},
        "scores: rows alone": lambda: {"directions": [small_direction(model)], "columns": False},
        "gradient norms of examples": lambda: {"squared": True},
    }
    for name, options in work.items():
        if name == "loss alone":
            with torch.no_grad():
                seconds = timed(scale.device, lambda: example_losses(model, batches[1]))
        else:
            seconds = _second_batch(scale, model, batches, **options())
        yield Figure(f"{name} / plain", seconds / plain, "ratio")
    with twice_differentiable(model):
        derivative = HessianVectorProduct(model, {n: torch.full_like(p, 1e-6) for n, p in model.named_parameters()})
        short = full_batches(model, scale.lengths[0], scale.lengths[0], 2)
        alone = timed(scale.device, partial(plain_pass, model, short[1]))
        seconds = _second_batch(scale, model, short, derivative=derivative)
    yield Figure("Hessian-vector product, one example / plain", seconds / alone, "ratio")


def _distilled(model: Any) -> Callable[..., Any]:
    prior = SelfDistillation(1.0, 1.0, 2.0, "max_prob")
    return lambda student, batch, layout: prior.losses(student, batch, layout, model)


def _second_batch(scale: Scale, model: Any, batches: list[Any], **options: Any) -> float:
    """Seconds of a pass's second batch."""
    times: list[float] = []

    def now() -> None:
        wait(scale.device)
        times.append(time.perf_counter())

    with scoring_mode(model, checkpointing=False):
        gradient_pass(model, lambda first: batches[first:], second_alone(now, now), **options)
    return times[1] - times[0]


def compiled(scale: Scale) -> Iterator[Figure]:
    """A masked step of fine-tuning with compiled layers beside one without, and what compiling takes."""
    model = build(scale.shapes[0], scale.device).train()
    training = masked(model, "scattered", 0.1)
    (batch,) = full_batches(model, scale.batch_tokens, scale.lengths[0], 1)
    step = partial(training.step, batch)
    eager = [timed(scale.device, step) for _ in range(2 + scale.rounds)][2:]
    with torch.no_grad():
        before = example_losses(model, batch).mean().item()
    compile_blocks(model)
    with torch.no_grad():
        after = example_losses(model, batch).mean().item()
    yield Figure("first compiled step", timed(scale.device, step), "s")
    fast = [timed(scale.device, step) for _ in range(2 + scale.rounds)][2:]
    yield Figure("step", median(eager), "s")
    yield Figure("step, compiled / not", median(fast) / median(eager), "ratio")
    yield Figure("loss, compiled − not", after - before, "nats")
