"""What lies in the output folder in each phase of a selection: states to resume from, and the result.

The states of phases under way are among them where they are largest, in a training of all weights, and where each
replica keeps its own of a pass: there one of each is counted, which is what a run needs; with room for two the older
one stays until the newer is complete.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dualsft.plans.job import SelectJob
from dualsft.plans.phase import Phase
from dualsft.selection.combined_objective import can_combine

SCORES, SCORE = "scores", 4
"""What they are called, and the bytes of one in a file."""
_OBJECTIVE = ("validation gradient", "prior gradient")
_MOMENT = "second moment"


def with_disk(job: SelectJob, phases: Sequence[Phase]) -> Iterator[Phase]:
    """The phases, each with all that lies on the disk in it; given is what each leaves there."""
    settings, lies = job.settings, dict[str, int]()
    combined = settings.path.along is None and can_combine(settings, job.data.sets)
    once = "then" not in settings.order
    passes = [phase.name for phase in phases[:-1]]
    for phase in phases:
        lies_before = dict(lies)
        if phase.name == "choice" and once:  # everything but the scores has been dropped
            lies = {}
        if combined and phase.name in _OBJECTIVE:
            lies["direction"] = sum(phase.disk.values())  # in the place of the sums
        elif not (phase.name == "scores" and once):  # whose sums become scores without being written
            lies |= phase.disk
        done = {SCORES: SCORE * job.shape.count} if once and phase.name == passes[-1] else {}
        state = phase.state
        if job.machine.replicas > 1 and not state and (done or phase.disk) and phase.name != "choice":
            state = {"sums of each replica": job.machine.replicas * SCORE * job.shape.count}
        under_way = lies_before | state if state else {}
        yield replace(phase, disk=max(lies | done, under_way, key=lambda parts: sum(parts.values())))
        if combined and phase.name in _OBJECTIVE and passes[passes.index(phase.name) + 1] not in _OBJECTIVE:
            lies.pop(_MOMENT, None)
