"""A plan as text: a table of its phases, whether it fits, and what to change where it does not."""

from collections.abc import Iterator, Sequence

from dualsft.plans.batch import BatchShape
from dualsft.plans.job import FitJob, Job
from dualsft.plans.phase import Phase, Plan
from dualsft.plans.remedies import Remedy
from dualsft.plans.sizes import gib
from dualsft.reports.words import counted, duration, memory, percent, short
from dualsft.runs.table import markdown_table

_CLOSE = 0.05
"""Share of the memory that contexts, workspaces and fragmentation easily take."""
UNKNOWN = (
    "Not in these figures: a driver's context and libraries' workspaces (1 to 2 GiB on a GPU), fragmentation, and "
    "what Python and its libraries take on the host."
)


def heading(job: Job) -> str:
    """What is planned, in two lines."""
    shape, machine = job.shape, job.machine
    dtype = str(shape.dtype).removeprefix("torch.")
    kind = "card" if machine.device == "cuda" else "process on the CPU"
    what, batch = ("fit", job.training) if isinstance(job, FitJob) else ("select", job.scoring)
    where = counted(machine.ranks, kind) if machine.ranks == 1 or machine.device == "cuda" else f"{machine.ranks} CPUs"
    shared = ", weights stored on the host" if machine.offload else ""
    if machine.ranks > 1 and not machine.offload:
        shared = ", all weights on each" if machine.shards == 1 else ", weights shared"
    if 1 < machine.replicas < machine.ranks:
        shared += f" by {machine.shards} each"
    return (
        f"{what} of {shape.name}: {short(shape.count)} weights in {dtype}, on {where}{shared}\n"
        f"Largest batch of a rank: {_batch(batch, job)}{_trained(job)}"
    )


def _batch(batch: BatchShape, job: Job) -> str:
    again = ", activations recomputed" if job.running.checkpointing else ""
    part = "all" if batch.supervised == 1 else percent(batch.supervised)
    return f"{batch.rows} x {batch.tokens:,} tokens, {part} of them supervised{again}"


def _trained(job: Job) -> str:
    if not isinstance(job, FitJob):
        return ""
    of = job.trained
    return f"\nTrained: {percent(of.share)} of each tensor's weights{', as whole rows' if of.structured else ''}"


def phase_table(plan: Plan) -> str:
    """Bytes of each phase on the rank that holds most, in GiB, and operations for a million tokens."""
    kinds = list(dict.fromkeys(kind for phase in plan.phases for kind in phase.held))
    has_step = any(phase.step for phase in plan.phases)
    step = ["step"] if has_step else []
    rows = [["GiB", *kinds, "batch", "(logits)", *step, "peak", "PFLOP per million tokens"]]
    for of in plan.phases:
        held = [gib(of.held[kind]) if of.held.get(kind) else "" for kind in kinds]
        batch = [gib(of.batch), f"({gib(of.logits)})"] if of.batch else ["", ""]
        steps = [gib(of.step) if of.step else ""] if has_step else []
        rows.append([of.name, *held, *batch, *steps, gib(of.peak), f"{of.flops / 1e9:,.1f}" if of.flops else ""])
    return markdown_table(rows)


def verdict(plan: Plan, limit: int | None) -> str:
    """The highest phase, and whether it fits."""
    highest = plan.highest
    begin = f"Highest peak: {gib(highest.peak)} GiB, in the phase {highest.name}"
    if limit is None:
        return f"{begin}. Give --memory, such as 80GiB, to see whether it fits."
    if highest.peak > limit:
        return f"{begin}: does not fit in {gib(limit)} GiB, {gib(highest.peak - limit)} GiB too much."
    if highest.peak > (1 - _CLOSE) * limit:
        return f"{begin}: too close to {gib(limit)} GiB to rely on, {gib(limit - highest.peak)} GiB less."
    return f"{begin}: fits in {gib(limit)} GiB, with {gib(limit - highest.peak)} GiB to spare."


def is_safe(plan: Plan, limit: int) -> bool:
    """Whether a plan fits with room for what it does not count."""
    return plan.highest.peak <= (1 - _CLOSE) * limit


def elsewhere(plan: Plan) -> Iterator[str]:
    """The host's memory, and the disk, in a line each."""
    fullest = max(plan.phases, key=lambda phase: sum(phase.host.values()))
    if fullest.host:
        yield f"Host, each rank: {gib(plan.host)} GiB in the phase {fullest.name} ({_parts(fullest.host)})"
    disk = plan.fullest.disk
    total = memory(sum(disk.values()))
    yield f"Disk, in the output folder: {total} in the phase {plan.fullest.name} ({_parts(disk)})"


def _parts(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {memory(size)}" for name, size in sizes.items())


def work(plan: Plan, throughput: float | None, ranks: int) -> Iterator[str]:
    """Operations and, at a given throughput of a rank, the time of each phase, where its tokens are known."""
    known = [phase for phase in plan.phases if phase.tokens is not None and phase.flops]
    if not known:
        return
    total = sum(_flops(phase) for phase in known)
    yield f"Work: {total / 1e15:,.1f} PFLOP ({', '.join(_done(phase, throughput, ranks) for phase in known)})"
    if throughput:
        yield f"Time at {throughput / 1e12:,.0f} TFLOP/s on each rank: {duration(total / throughput / ranks)}"


def _flops(phase: Phase) -> float:
    assert phase.tokens is not None
    return phase.flops * phase.tokens


def _done(phase: Phase, throughput: float | None, ranks: int) -> str:
    time = f", {duration(_flops(phase) / throughput / ranks)}" if throughput else ""
    return f"{phase.name} {_flops(phase) / 1e15:,.1f}{time}"


def remedy_table(found: Sequence[Remedy], limit: int) -> str:
    """Each change with its new peak."""
    if not found:
        return "No change of settings lowers the peak: take a smaller model, or a larger card."
    rows = [["change, alone", "cost", "peak, GiB", "in", "fits"]]
    for of in found:
        fits = "no" if of.peak > limit else "yes" if of.peak <= (1 - _CLOSE) * limit else "just"
        rows.append([of.change, of.cost, gib(of.peak), of.phase, fits])
    return markdown_table(rows)
