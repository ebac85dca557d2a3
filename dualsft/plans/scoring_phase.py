"""The phase of one scoring pass, as selections of all kinds have it."""

from dualsft.plans.batch import BatchShape
from dualsft.plans.job import SelectJob
from dualsft.plans.phase import Phase
from dualsft.plans.tracing import Prepare, trace


def scoring_phase(
    job: SelectJob,
    name: str,
    prepare: Prepare,
    batch: BatchShape | None = None,
    *,
    directions: int = 0,
    columns: bool = True,
    more: dict[str, int] | None = None,
) -> Phase:
    """One pass: what it holds, the trace of a batch, and the sums that it leaves in a file."""
    shards, batch = job.shards, batch or job.scoring
    cost = trace(job.shape, batch, prepare)
    held = {"weights": shards.weights, **(more or {}), **({"accumulator": shards.sums} if columns else {})}
    size = shards.with_units(cost.size, directions, gradients=columns)
    on_host = {} if job.machine.device == "cpu" or not columns else {"sums, while written": shards.sums}
    disk = {f"sums of the {name}": all_bytes(job)} if columns else {}
    if job.machine.offload:
        held, on_host = {}, {**held, **on_host}
    return Phase(name, held, size, cost.logits, host=on_host, disk=disk, flops=cost.flops / batch.size)


def all_bytes(job: SelectJob, stored: bool = False) -> int:
    """Bytes of the weights, or of sums, of all ranks together."""
    return sum(w.size * (w.itemsize if stored else w.wide) for w in job.shape.weights)


def times(tokens: float | None, share: float) -> float | None:
    """So many times the tokens, if they are known."""
    return None if tokens is None else tokens * share
