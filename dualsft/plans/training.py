"""The phase that trains: masters, gradients and the optimizer's state of the chosen weights, and its step."""

from functools import partial

from dualsft.plans import passes
from dualsft.plans.held import INDEX
from dualsft.plans.job import FitJob, Job, Trained
from dualsft.plans.phase import Phase, Plan
from dualsft.plans.tracing import trace

_MASTER = 4
_PLACE = 8
"""Bytes of the place of a changed weight in a delta (int64)."""
_STAY = ("weights", "masters", "optimizer", "indices", "base values")
"""What a training holds that is still there after its last step."""


def training_phase(job: Job, name: str, trained: Trained) -> Phase:
    """The phase of this name in which a job trains."""
    shards, machine, batch = job.shards, job.machine, job.training
    # a rank keeps its shards' alone, which no trace shows
    keeps = trained.accumulated > 1 or machine.ranks > 1 or trained.prior
    train = partial(
        passes.train,
        batch=batch,
        running=job.running,
        share=trained.share,
        structured=trained.structured,
        accumulated=keeps,
        prior=trained.prior,
    )
    cost = trace(job.shape, batch, train)
    masters = round(trained.share * shards.sums)
    held = {"weights": shards.weights, "masters": masters, "optimizer": round(masters / _MASTER * trained.state)}
    if trained.share < 1:
        held["indices"] = round(trained.share * shards.bytes_of(lambda _: INDEX))
    if trained.prior:
        held["base values"] = round(trained.share * shards.weights)
    if keeps:
        held["gradients"] = masters
    passing = {"foreach": masters, "single": round(2 * trained.share * shards.widest), "fused": 0}
    step = passing[trained.step] + (0 if keeps else masters)
    if machine.offload:
        return Phase(
            name, {}, shards.with_units(cost.size, 0, True), cost.logits, host=held, flops=cost.flops / batch.size
        )
    loading = {} if machine.device == "cpu" else {"weights, while loaded": shards.weights}
    return Phase(
        name, held, shards.with_units(cost.size, 0, True), cost.logits, step, loading, flops=cost.flops / batch.size
    )


def plan_fit(job: FitJob) -> Plan:
    """The phases of a fit: one, which leaves a model, a delta and checkpoints."""
    phase = training_phase(job, "training", job.trained)
    shape, chosen = job.shape, job.trained.share * job.shape.count
    whole = sum(weight.size * weight.itemsize for weight in shape.weights)
    kept = round(chosen * (_MASTER + job.trained.state))
    phase.disk.update(
        {
            "model/": whole,
            "delta.safetensors": round(chosen * (8 + whole / shape.count)),
            f"{job.checkpoints} checkpoints": job.checkpoints * kept,
        }
    )
    if job.machine.device != "cpu":
        phase.host["a checkpoint, while written"] = kept
    phases = [phase]
    if job.data.pool_tokens is not None:
        phases = [phase.over(job.data.pool_tokens * job.data_share * job.epochs)]
    if job.shards.sharded:
        phases.append(_export(job, phase))
    return Plan(phases)


def _export(job: FitJob, training: Phase) -> Phase:
    """The export of shards: rank zero gathers all changes, where a single process compares one tensor after another."""
    shape, machine = job.shape, job.machine
    changes = job.trained.share * sum(weight.size * (_PLACE + weight.itemsize) for weight in shape.weights)
    own = changes / machine.ranks if machine.ranks > 1 else 0  # beside those of all ranks
    gathered = {"changes": round(changes + own)}
    held = {name: size for name, size in (training.host if machine.offload else training.held).items() if name in _STAY}
    if machine.offload:
        return Phase("export", {}, host={**held, **gathered})
    if machine.device == "cpu":
        return Phase("export", {**held, **gathered})
    return Phase("export", held, host=gathered)
