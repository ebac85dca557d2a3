"""The phases of a selection: the warm-up, the gradients of V, the passes over the pool, and the choice."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from dualsft.allocators.choice import largest_part
from dualsft.plans import passes
from dualsft.plans.along_path import is_known_path, path_phases
from dualsft.plans.disk import SCORE, SCORES, with_disk
from dualsft.plans.job import Job, SelectJob
from dualsft.plans.phase import Phase, Plan
from dualsft.plans.scoring_phase import all_bytes, scoring_phase, times
from dualsft.plans.training import dense_training, training_phase
from dualsft.scorers import SecondOrderScorer
from dualsft.selection.parameter_choice import chooses_together
from dualsft.selection.terms import HESSIAN

_RANKING = 2**26
"""Bytes while weights are ranked, however many there are: a sample, and counts of the scores near the threshold."""


def plan_select(job: SelectJob) -> Plan:
    """The phases of a selection, at one scoring checkpoint or along the target.

    Raises:
        UserError: if it goes along another path, of whose passes nothing is known.
    """
    if is_along_path(job):
        phases = [*_warm_up(job), *path_phases(job), _choice(job, directions={})]
    else:
        held = _directions(job) if "then" in job.settings.order else {}  # by which the sides take turns
        phases = [*_warm_up(job), *_objective(job), *_pool(job), _choice(job, held)]
    return Plan([*with_disk(job, phases)])


def is_along_path(job: Job) -> bool:
    """Whether a job is a selection along a path."""
    return isinstance(job, SelectJob) and job.settings.path.along is not None


def can_be_planned(job: Job) -> bool:
    """Whether a job is none along a path of whose passes nothing is known."""
    return not (isinstance(job, SelectJob) and is_along_path(job)) or is_known_path(job.settings)


def _warm_up(job: SelectJob) -> Iterator[Phase]:
    warmup = job.settings.warmup
    if warmup.checkpoint is not None or warmup.fraction == 0:
        return
    trained = dense_training(job)
    phase = training_phase(job, "warm-up", trained)
    phase.disk["warmed-up weights"] = all_bytes(job, stored=True)
    if job.settings.needs_second_moment_of_warmup:
        phase.disk["second moment"] = all_bytes(job)
    phase.state["state under way"] = 3 * all_bytes(job)  # masters and both moments
    if job.machine.device != "cpu" and not trained.on_host:
        phase.host["its state, while written"] = 3 * job.shards.sums  # masters and both moments
    yield phase.over(times(job.data.pool_tokens, warmup.fraction * warmup.epochs))


def _objective(job: SelectJob) -> Iterator[Phase]:
    """The passes for v, and for the empirical Fisher."""
    settings, seen, pool = job.settings, job.data.validation_tokens, job.data.pool_tokens
    gradient = partial(passes.gradient, batch=job.scoring, running=job.running)
    yield _of_each_set(job, scoring_phase(job, "validation gradient", gradient)).over(seen)
    if settings.prior.weight:
        yield _prior(job).over(times(pool, settings.prior.fraction))
    if "empirical_fisher" in settings.scorer.needs:
        alone = job.scoring.alone()
        squared = partial(passes.gradient, batch=alone, running=job.running, squared=True)
        yield _of_each_set(job, scoring_phase(job, "validation squared gradient", squared, alone)).over(seen)


def _of_each_set(job: SelectJob, phase: Phase) -> Phase:
    """A pass over each validation set, which leaves sums of its own."""
    return replace(phase, disk={name: job.data.sets * size for name, size in phase.disk.items()})


def _prior(job: SelectJob) -> Phase:
    """The prior's pass; the model is its own teacher where it is still the base model."""
    warmup = job.settings.warmup
    untouched = warmup.checkpoint is None and warmup.fraction == 0

    base = None if untouched else job.shape
    logits = job.logits_on_host(job.scoring)
    gradient = partial(passes.distilled, batch=job.scoring, running=job.running, base=base, logits_on_host=bool(logits))
    phase = scoring_phase(job, "prior gradient", gradient, more={} if untouched else {"teacher": job.shards.weights})
    phase.host.update(logits)
    return phase


def _pool(job: SelectJob) -> Iterator[Phase]:
    """The passes over the pool; products with the Hessian come between the gradient and the rows."""
    needs, pool = frozenset(job.settings.scorer.needs), job.data.pool_tokens
    first = isinstance(job.settings.scorer, SecondOrderScorer) or bool(needs & {"pool_gradient", *HESSIAN})
    by_turns = "then" in job.settings.order
    if first or by_turns:
        gradient = partial(passes.gradient, batch=job.scoring, running=job.running)
        yield scoring_phase(job, "pool gradient", gradient).over(pool)
    if needs & HESSIAN:
        yield _product(job, "hessian_vector" in needs).over(job.data.validation_tokens)
    yield _rows(job, columns=not (first or by_turns), masked=by_turns).over(pool)


def _product(job: SelectJob, exact: bool) -> Phase:
    """A product with the Hessian along the pool step."""
    weights = job.shards.weights
    if not exact:
        work = partial(passes.gradient, batch=job.scoring, running=job.running)
        held = {"direction": weights, "weights before": weights}
        return scoring_phase(job, "validation gradient a step", work, more=held)
    work = partial(passes.hessian_vector, batch=job.scoring, running=job.running)
    phase = scoring_phase(job, "validation Hessian-vector product", work, more={"direction": weights})
    if job.shards.ranks > 1:  # the model is unsharded for it, with the direction and the sums
        whole, on_host = job.shape.weights, "accumulator" in phase.host and not job.machine.offload
        phase.held["full weights and direction"] = sum(2 * w.size * w.itemsize for w in whole)
        (phase.host if on_host else phase.held)["full sums"] = sum(w.size * w.wide for w in whole)
    return phase


def _rows(job: SelectJob, columns: bool, masked: bool) -> Phase:
    settings, held = job.settings, _directions(job)
    count = _number(job)
    work = partial(
        passes.scores,
        batch=job.scoring,
        running=job.running,
        directions=count,
        columns=columns,
        by_token=settings.token_scores,
    )
    if masked:
        held["directions of chosen weights"] = count * job.shards.directions
    return scoring_phase(job, "scores", work, directions=count, columns=columns, more=held)


def _number(job: SelectJob) -> int:
    """How many directions there are: one for each validation set, and for each of its halves."""
    return job.data.sets * (3 if job.settings.stability else 1)


def _directions(job: SelectJob) -> dict[str, int]:
    """The bytes of all directions, by what they are called."""
    count = _number(job)
    return {f"{count} directions" if count > 1 else "direction": count * job.shards.directions}


def _choice(job: SelectJob, directions: dict[str, int]) -> Phase:
    """Ranking on the host of rank zero, or of all, and the artifact; the directions stay where the sides take turns."""
    count, ranks = job.shape.count, job.machine.ranks
    held = {"weights": job.shards.weights, **directions}
    of_scores = "scores, in files" if job.shards.sharded or ranks > 1 else "scores"
    together = ranks if chooses_together(job.settings) else 1
    part = sum(largest_part(weight.size, together) for weight in job.shape.weights)
    host = {of_scores: SCORE * part, "mask": part, "ranking": _RANKING}
    if together > 1:
        host["mask of all, in bits"] = count // 8
    disk = {SCORES: SCORE * count, "mask.safetensors": -(-count // 8)}
    if job.settings.parameter_scores == "bfloat16":
        disk["rounded scores"] = 2 * count
    if job.machine.device == "cpu":
        return Phase("choice", {**held, **host}, disk=disk)
    if job.machine.offload:
        return Phase("choice", {}, host={**held, **host}, disk=disk)
    return Phase("choice", held, host=host, disk=disk)
