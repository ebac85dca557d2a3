"""What to change where a plan does not fit: each change alone, with the peak that it leads to, the cheapest first."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from dualsft.plans.job import FitJob, Job, SelectJob
from dualsft.plans.phase import Plan
from dualsft.plans.scoring import plan_select
from dualsft.plans.shape import ModelShape
from dualsft.plans.training import plan_fit
from dualsft.scorers import FirstOrder

_MOST_RANKS = 64


class Remedy(NamedTuple):
    """A change of settings.

    Attributes:
        change: The settings, as they are written.
        cost: What it costs.
        peak: Bytes of the highest phase after it, on the rank that holds most.
        phase: That phase.
    """

    change: str
    cost: str
    peak: int
    phase: str


def plan_job(job: Job) -> Plan:
    """The plan of a job of either kind."""
    if isinstance(job, SelectJob):
        return plan_select(job)
    assert isinstance(job, FitJob)
    return plan_fit(job)


def remedies(job: Job, memory: int) -> list[Remedy]:
    """The changes that lower the peak, each of the job as it is; ranks are as many as it takes, up to 64."""
    before = plan_job(job).highest.peak
    found = [_after(change, cost, changed) for change, cost, changed in _changes(job)]
    found += _by_ranks(job, memory)
    return [remedy for remedy in found if remedy.peak < before]


def _after(change: str, cost: str, job: Job) -> Remedy:
    highest = plan_job(job).highest
    return Remedy(change, cost, highest.peak, highest.name)


def _changes(job: Job) -> Iterator[tuple[str, str, Job]]:
    """The changes in order of cost: what it is, what it costs, and the job with it."""
    data, running = job.data, job.running
    if (least := data.max_length) < data.batch_tokens:
        yield f"data.batch_tokens {least}", "more batches", replace(job, data=replace(data, batch_tokens=least))
    if not running.checkpointing:
        recomputed = replace(job, running=replace(running, checkpointing=True))
        yield "model.gradient_checkpointing true", "a forward pass more for each batch", recomputed
    if job.shape.dtype.itemsize > 2:
        narrow = ModelShape(job.shape.folder, "bfloat16")
        yield "model.dtype bfloat16", "rounded weights and activations", replace(job, shape=narrow)
    if isinstance(job, SelectJob):
        yield from _of_selection(job)
    elif isinstance(job, FitJob) and not job.trained.structured and job.trained.share > 0.1:
        share = replace(job, trained=replace(job.trained, share=0.1))
        yield "model.selection of a tenth of the weights", "the other weights stay", share
    if job.data.max_length > (shorter := job.data.max_length // 2) >= 128:
        half = replace(data, max_length=shorter, batch_tokens=min(data.batch_tokens, shorter))
        yield f"data.max_length and data.batch_tokens {shorter}", "longer examples are cut", replace(job, data=half)
    if not job.machine.offload and job.machine.device != "cpu":
        offloaded = replace(job, machine=replace(job.machine, offload=True, replicas=1))
        yield "trainer.strategy fsdp2_cpu_offload", "weights and sums cross the bus for each batch", offloaded


def _of_selection(job: SelectJob) -> Iterator[tuple[str, str, Job]]:
    settings = job.settings

    def but(**options: Any) -> SelectJob:
        return replace(job, settings=replace(settings, **options))

    if settings.offload_sums != "always" and job.machine.device != "cpu" and not job.machine.offload:
        yield "model.offload_sums always", "gradients cross the bus for each batch", but(offload_sums="always")
    if settings.stability:
        yield "model.stability false", "no measure of the scores' noise", but(stability=False)
    if not isinstance(settings.scorer, FirstOrder):
        yield "model.scorer first_order", "no curvature", but(scorer=FirstOrder(), step_size=2e-5)
    trains = settings.path.along is not None or (settings.warmup.checkpoint is None and settings.warmup.fraction)
    if trains and job.machine.device != "cpu" and not job.machine.offload:
        cost = "each step of training all weights crosses the bus"
        yield "model.offload_optimizer always", cost, but(offload_optimizer="always")
    if settings.warmup.checkpoint is None and settings.warmup.fraction and isinstance(settings.scorer, FirstOrder):
        cold = but(warmup=replace(settings.warmup, fraction=0.0, keep=False), preconditioner="none")
        yield "model.warmup.fraction 0 and model.preconditioner none", "scores of the base model, for plain SGD", cold


def _by_ranks(job: Job, memory: int) -> Iterator[Remedy]:
    """The fewest ranks that fit with the weights in shards, in powers of two times those that there are."""
    ranks = job.machine.ranks * (1 if job.machine.replicas > 1 else 2)
    while ranks <= _MOST_RANKS:
        remedy = _after(*_on(job, ranks))
        if remedy.peak <= memory or ranks == _MOST_RANKS:
            yield remedy
            return
        ranks *= 2


def _on(job: Job, ranks: int) -> tuple[str, str, Job]:
    spread = replace(job, machine=replace(job.machine, ranks=ranks, offload=False, replicas=1))
    cost = "each batch crosses the network" if ranks == job.machine.ranks else "more cards"
    return f"trainer.devices {ranks // job.machine.nodes} and trainer.strategy fsdp2", cost, spread
