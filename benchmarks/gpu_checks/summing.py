"""Scoring passes with their sums of gradients on the device (never) and on the host (always)."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from memory import Meter
from torch import Tensor

from dualsft.data.layout import Batch
from dualsft.matrix.pass_result import GradientPass
from dualsft.matrix.passes import gradient_pass
from dualsft.selection.passes import scoring_mode
from gpu_checks.models import build, full_batches, release, small_direction, timed
from gpu_checks.section import Figure, Scale


class _Measured(NamedTuple):
    """Seconds of a batch behind the first, bytes above weights and direction, and the sums, on the host."""

    seconds: float
    peak: int
    sums: dict[str, Tensor]


def summing(scale: Scale) -> Iterator[Figure]:
    """Time of a batch, peak, and whether the sums are the same; of the large model, on the host alone, the peak."""
    model = build(scale.shapes[1], scale.device)
    u = small_direction(model)
    batches = full_batches(model, scale.batch_tokens, scale.lengths[1], 1 + scale.rounds)
    _pass(model, u, False, batches[:1])  # loads what is loaded when it is first used
    found = {}
    for place in ("never", "always"):
        found[place] = _measured(scale.device, partial(_pass, model, u, place == "always"), batches)
        yield Figure(f"{place}: batch", found[place].seconds, "s")
        yield Figure(f"{place}: peak above weights and direction", found[place].peak / 2**30, "GiB")
    yield Figure("always / never: batch", found["always"].seconds / found["never"].seconds, "ratio")
    one, other = (of.sums for of in found.values())
    yield Figure("always, never: sums that differ", sum(int((one[name] != other[name]).sum()) for name in u))
    del model, u
    model = build(scale.shapes[2], scale.device)
    u = small_direction(model)
    release(scale.device)
    meter = Meter(scale.device)
    meter.restart()
    _pass(model, u, True, batches[:2])
    yield Figure(f"{scale.shapes[2]}, always: peak above weights and direction", meter.peak() / 2**30, "GiB")


def _measured(device: str, work: Any, batches: list[Batch]) -> _Measured:
    release(device)
    meter = Meter(device)
    meter.restart()
    first = timed(device, lambda: work(batches[:1]))
    found: list[GradientPass] = []
    whole = timed(device, lambda: found.append(work(batches)))
    sums = {name: total.cpu() for name, total in found[0].sums.items()}
    return _Measured((whole - first) / (len(batches) - 1), meter.peak(), sums)


def _pass(model: Any, u: dict[str, Tensor], on_host: bool, batches: list[Batch]) -> GradientPass:
    with scoring_mode(model, checkpointing=True):
        return gradient_pass(model, lambda first: batches[first:], directions=[u], sums_on_host=on_host)
