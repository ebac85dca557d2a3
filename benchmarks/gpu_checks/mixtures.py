"""A mixture of experts: its scores beside plain autograd, and what scoring it costs beside a plain pass."""

from collections.abc import Iterator
from functools import partial

from experts import WAYS, Shape, run, seconds
from numerics import autograd_pass, relative_error

from dualsft.matrix.passes import gradient_pass
from dualsft.models.experts import group_experts
from gpu_checks.models import full_batches, padded, ragged, release, second_alone, small_direction
from gpu_checks.profiling import Profiler
from gpu_checks.scores import from_batch, rows_of
from gpu_checks.section import Figure, Scale

_NARROW = Shape(hidden=128, width=64, layers=2, experts=16, top_k=2)
_WIDE = Shape(hidden=2048, width=768, layers=2, experts=128, top_k=8)
"""Two blocks of Qwen3 30B-A3B."""


def experts(scale: Scale) -> Iterator[Figure]:
    """Errors beside autograd over single examples and a loop over experts; seconds, launches, waits and reads."""
    yield from _errors(scale)
    release(scale.device)
    shape = _WIDE if scale.cuda else _NARROW
    model = shape.model(scale.device, "bfloat16")
    batches = full_batches(model, scale.batch_tokens, scale.lengths[0], 2)
    for name, value in seconds(model, batches, scale.rounds).items():
        yield Figure(name, value, "s" if name == "plain" else "ratio")
    for way in WAYS:
        profiler = Profiler(scale.device)
        run(model, batches, way, second_alone(profiler.start, profiler.stop))
        yield from profiler.counts().figures(way)


def _errors(scale: Scale) -> Iterator[Figure]:
    for dtype in ("float64", "float32", "bfloat16"):
        model = _NARROW.model(scale.device, dtype)
        batch = padded(model, ragged(model, [scale.lengths[0] - k for k in range(4)]))
        u = small_direction(model)
        model.set_experts_implementation("eager")
        reference = autograd_pass(model, partial(from_batch, [batch]), directions=[u])
        group_experts(model)
        found = gradient_pass(model, partial(from_batch, [batch]), directions=[u])
        yield Figure(f"rows, {dtype}", relative_error([rows_of(found, reference)]))
        yield Figure(f"columns, {dtype}", relative_error([(found.sums[n], s) for n, s in reference.sums.items()]))
