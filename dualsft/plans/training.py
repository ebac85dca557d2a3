"""The phase that trains: masters, gradients and the optimizer's state of the chosen weights, and its step."""

from functools import partial

from dualsft.plans import passes
from dualsft.plans.held import INDEX
from dualsft.plans.job import FitJob, Job, Trained
from dualsft.plans.phase import Phase, Plan
from dualsft.plans.tracing import trace

_MASTER = 4


def training_phase(job: Job, name: str, trained: Trained) -> Phase:
    """The phase of this name in which a job trains."""
    shards, machine, batch = job.shards, job.machine, job.training
    keeps = trained.accumulated > 1 or machine.ranks > 1  # a rank keeps its shards' alone, which no trace shows
    train = partial(
        passes.train,
        batch=batch,
        running=job.running,
        share=trained.share,
        structured=trained.structured,
        accumulated=keeps,
    )
    cost = trace(job.shape, batch, train)
    masters = round(trained.share * shards.sums)
    held = {"weights": shards.weights, "masters": masters, "optimizer": round(masters / _MASTER * trained.state)}
    if trained.share < 1:
        held["indices"] = round(trained.share * shards.bytes_of(lambda _: INDEX))
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
    if job.data.pool_tokens is None:
        return Plan([phase])
    return Plan([phase.over(job.data.pool_tokens * job.data_share * job.epochs)])
