"""The phase that trains: masters, gradients and the optimizer's state of the chosen weights, and its step."""

from functools import partial

from dualsft.plans import passes
from dualsft.plans.held import INDEX
from dualsft.plans.job import ADAM_STATE, FitJob, Job, SelectJob, Trained
from dualsft.plans.phase import Phase, Plan
from dualsft.plans.tracing import trace
from dualsft.selection.offload import COPIES, is_too_large

_MASTER = 4
_PLACE = 8
"""Bytes of the place of a changed weight in a delta (int64)."""
_STAY = ("weights", "masters", "optimizer", "indices", "base values")
"""What a training holds that is still there after its last step."""


def training_phase(job: Job, name: str, trained: Trained) -> Phase:
    """The phase of this name in which a job trains."""
    shards, machine, batch = job.shards, job.machine, job.training
    logits = job.logits_on_host(batch) if trained.prior else {}
    # a rank keeps its shards' alone, which no trace shows
    keeps = trained.accumulated > 1 or shards.ranks > 1 or trained.prior
    train = partial(
        passes.train,
        batch=batch,
        running=job.running,
        share=trained.share,
        structured=trained.structured,
        accumulated=keeps,
        prior=trained.prior,
        logits_on_host=bool(logits),
        on_host=trained.on_host,
    )
    cost = trace(job.shape, batch, train)
    masters = round(trained.share * shards.sums)
    state = _state(job, trained)
    if keeps:
        state["gradients"] = masters
    phase = partial(
        Phase,
        name,
        batch=shards.with_units(cost.size, 0, True),
        logits=cost.logits,
        flops=cost.flops / batch.size,
    )
    weights = {"weights": shards.weights}
    if machine.offload:
        return phase({}, host=weights | state | logits)
    if trained.on_host:
        return phase(weights, host={**state, "gradients": masters, "gradients on their way": shards.weights})
    passing = {"foreach": masters, "single": round(2 * trained.share * shards.widest), "fused": 0}
    step = passing[trained.step] + (0 if keeps else masters)
    loading = {} if machine.device == "cpu" else {"weights, while loaded": shards.weights}
    return phase(weights | state, step=step, host=loading | logits)


def _state(job: Job, trained: Trained) -> dict[str, int]:
    """The bytes that a training holds beside the weights, whatever its batches, by what they are."""
    shards, share = job.shards, trained.share
    masters = round(share * shards.sums)
    state = {"masters": masters, "optimizer": round(masters / _MASTER * trained.state)}
    if share < 1:
        state["indices"] = round(share * shards.bytes_of(lambda _: INDEX))
    if trained.prior:
        state["base values"] = round(share * shards.weights)
    return state


def dense_training(job: SelectJob, state: float = ADAM_STATE) -> Trained:
    """The training of all weights in a selection, by an optimizer that keeps so many bytes for each."""
    machine, offload = job.machine, job.settings.offload_optimizer
    if machine.device == "cpu":
        return Trained(state=state, step="single")
    sums, free = job.shards.sums, (machine.memory or 0) - job.shards.weights
    on_host = offload == "always" or (
        offload == "auto" and machine.memory is not None and is_too_large(COPIES * sums, free)
    )
    return Trained(state=state, step="fused", on_host=on_host)


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
    own = changes / machine.shards if machine.shards > 1 else 0  # beside those of all ranks
    gathered = {"changes": round(changes + own)}
    held = {name: size for name, size in (training.host if machine.offload else training.held).items() if name in _STAY}
    if machine.offload:
        return Phase("export", {}, host={**held, **gathered})
    if machine.device == "cpu":
        return Phase("export", {**held, **gathered})
    return Phase("export", held, host=gathered)
