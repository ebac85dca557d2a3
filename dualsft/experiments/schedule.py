"""Doing what is missing of an experiment's jobs, several at a time on several devices, and how long it takes."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from dualsft.errors import UserError
from dualsft.experiments.bank import Bank, Result, is_taken, log_file, read_result, write_result
from dualsft.experiments.jobs import Job
from dualsft.experiments.workers import Worker, do_all
from dualsft.runs.bars import bar
from dualsft.runs.progress import say

WORKER = "dualsft.commands.experiment_worker"
_KILLED_FOR_MEMORY = -int(signal.SIGKILL) if hasattr(signal, "SIGKILL") else None


@contextmanager
def workers_for(parallel: int | None) -> Iterator[list[Worker]]:
    """Workers that do jobs at the same time, started when they have something to do, and stopped in the end.

    Args:
        parallel: How many; None for one on each accelerator of this machine, or one if it has none.

    Raises:
        UserError: if there are not as many accelerators, where there are any.
    """
    if parallel is not None and parallel < 1:
        raise UserError(f"parallel={parallel} is too small: at least 1 job is done at a time.")
    devices = torch.cuda.device_count()
    count = parallel or max(devices, 1)
    if devices and count > devices:
        raise UserError(f"parallel={count} asks for more than the {devices} accelerators of this machine; give fewer.")
    if count == 1:
        own: list[dict[str, str]] = [{}]  # may use all devices, if a job's trainer does
    elif devices:
        own = [{"CUDA_VISIBLE_DEVICES": str(k)} for k in range(count)]
    else:
        own = [{"OMP_NUM_THREADS": str(max(torch.get_num_threads() // count, 1))}] * count
    workers = [Worker(WORKER, variables) for variables in own]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.stop()


def complete(bank: Bank, jobs: Sequence[Job], workers: Sequence[Worker], label: str) -> dict[str, Result]:
    """Do those of the jobs that are missing; return the results by key, those of jobs that failed among them.

    The bar, under a label, counts the examples that pass through the model.
    """
    missing = bank.missing(jobs)
    names = {bank.place(job): job for job in missing}
    places = [bank.put(job) for job in missing]
    total = sum(job.work for job in missing)
    with bar(label, total, show=bool(missing)) as shown:

        def told() -> str:
            return f"{len(missing) - len(names)} of {len(missing)} runs"

        def done(place: Path, exit_code: int | None) -> None:
            job = names.pop(place)
            if exit_code is not None:
                write_result(place, Result(error=_death(exit_code, place)))
            shown.advance(job.work, told())
            result = read_result(place)
            if result is not None and result.error is not None:
                say(f"{job.name} failed: {result.error}")

        do_all(places, workers, done, lambda: shown.advance(0, told()), is_taken)
    return {job.key: found for job in jobs if (found := bank.result(job)) is not None}


def _death(exit_code: int, place: Path) -> str:
    """Why a worker died, as far as its exit code tells."""
    if exit_code == _KILLED_FOR_MEMORY:
        return "its process was killed, as a system does when memory runs out"
    return f"its process ended with exit code {exit_code}; {log_file(place)} has what it printed"


def seconds_left(bank: Bank, jobs: Sequence[Job]) -> float | None:
    """How long the missing jobs take one after another, at the rate of those of their kind that the bank has.

    None if it has none of some kind that is missing.
    """
    total, missing = 0.0, bank.missing(jobs)
    for kind in {job.kind for job in missing}:
        rates = [
            found.seconds / job.work
            for job in jobs
            if job.kind == kind and (found := bank.result(job)) is not None and found.error is None
        ]
        if not rates:
            return None
        total += sum(job.work for job in missing if job.kind == kind) * sum(rates) / len(rates)
    return total


def plan(bank: Bank, jobs: Sequence[Job], parallel: int) -> str:
    """What would be done, one line a job, and how long it takes, as far as finished jobs tell."""
    missing = {job.key for job in bank.missing(jobs)}
    once = {job.key: job for job in jobs}
    lines = [f"{'to do' if key in missing else 'done':<6} {job.kind:<9} {job.name}" for key, job in once.items()]
    lines.append(f"{len(missing)} of {len(once)} jobs are to be done, {parallel} at a time")
    left = seconds_left(bank, jobs)
    if left is None:
        lines.append("how long they take is known once one of each kind is done")
    else:
        lines.append(f"at the rate of those that are done, in about {readable(left / parallel)}")
    return "\n".join(lines)


def readable(seconds: float) -> str:
    """A time in the unit that suits it."""
    for size, unit in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
