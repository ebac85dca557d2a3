"""The phase of one scoring pass, as selections of all kinds have it."""

from dualsft.matrix.host_sums import PIECE, PLACES
from dualsft.plans.batch import BatchShape
from dualsft.plans.job import SelectJob
from dualsft.plans.phase import Phase
from dualsft.plans.tracing import Prepare, trace
from dualsft.selection.offload import is_too_large


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
    held, host = {"weights": shards.weights, **(more or {})}, {}
    if columns and _sums_on_host(job, held):
        pieces = PLACES * min(PIECE, shards.widest)
        held["gradients on their way"] = max(pieces, shards.largest)  # one stays until its last piece is copied
        host = {"accumulator": shards.sums, "gradients on their way": pieces}
    elif columns:
        held["accumulator"] = shards.sums
        host = {} if job.machine.device == "cpu" else {"sums, while written": shards.sums}
    size = shards.with_units(cost.size, directions, gradients=columns)
    disk = {f"sums of the {name}": all_bytes(job)} if columns else {}
    if job.machine.offload:
        held, host = {}, {**held, **host}
    return Phase(name, held, size, cost.logits, host=host, disk=disk, flops=cost.flops / batch.size)


def _sums_on_host(job: SelectJob, beside: dict[str, int]) -> bool:
    """Whether sums go to the host, with these tensors on the device: as a run decides, where its memory is known."""
    machine, offload = job.machine, job.settings.offload_sums
    if machine.device == "cpu" or machine.offload:
        return False
    if offload != "auto":
        return offload == "always"
    return machine.memory is not None and is_too_large(job.shards.sums, machine.memory - sum(beside.values()))


def all_bytes(job: SelectJob, stored: bool = False) -> int:
    """Bytes of the weights, or of sums, of all ranks together."""
    return sum(w.size * (w.itemsize if stored else w.wide) for w in job.shape.weights)


def times(tokens: float | None, share: float) -> float | None:
    """So many times the tokens, if they are known."""
    return None if tokens is None else tokens * share
