"""The phases of a selection along a path that trains on the validation set, from the scoring checkpoint on."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from dualsft.errors import UserError
from dualsft.plans import passes
from dualsft.plans.job import ADAM_STATE, SelectJob
from dualsft.plans.phase import Phase
from dualsft.plans.scoring_phase import all_bytes, scoring_phase, times
from dualsft.plans.training import dense_training, training_phase
from dualsft.selection.paths.settings import EPOCHS
from dualsft.selection.settings import SelectionSettings


def path_phases(job: SelectJob) -> Iterator[Phase]:
    """The training, the losses at its points, and the passes that score along it.

    Raises:
        UserError: if nothing is known of the path's passes.
    """
    path = job.settings.path
    if not is_known_path(job.settings):
        raise UserError(
            "A plan knows selections at one scoring checkpoint and along the target; set model.path.along to target or "
            "null, or give --probe, which runs a few batches of each phase."
        )
    seen, pool = job.data.validation_tokens, job.data.pool_tokens
    yield _training(job).over(times(seen, (1 - path.held_out) * (path.epochs or EPOCHS)))
    if path.held_out:
        yield _losses(job, "held-out loss").over(times(seen, path.held_out * (_pieces(job) + 1)))
    yield _losses(job, "pool loss").over(times(pool, 2))
    columns = job.settings.chooses_weights
    over_pool = columns and path.columns != "target"
    points = path.most_pieces + 1
    if over_pool or job.settings.token_scores or "then" in job.settings.order:
        yield _point(job, "pool", columns=over_pool).over(times(pool, points))
    if columns and path.columns != "pool":
        yield _losses(job, "validation loss").over(times(seen, 2))
        yield _point(job, "validation", columns=True).over(times(seen, points))


def is_known_path(settings: SelectionSettings) -> bool:
    """Whether a path trains on the validation set, and its rows are the falls of the losses."""
    rule = settings.path_rule
    return rule.trains_on == "target" and rule.is_complete and rule.adds_rows


def _training(job: SelectJob) -> Phase:
    """The training that the path consists of, which leaves the weights at its points in files."""
    state = ADAM_STATE if job.settings.path.optimizer == "adamw" else 0.0
    phase = training_phase(job, "path", dense_training(job, state))
    phase.disk["points of the path"] = job.data.sets * (_pieces(job) + 1) * all_bytes(job, stored=True)
    phase.state.update({**phase.disk, "state under way": round((4 + state) / 4 * all_bytes(job))})
    return phase


def _pieces(job: SelectJob) -> int:
    pieces = job.settings.path.pieces
    return pieces if isinstance(pieces, int) else len(pieces)


def _losses(job: SelectJob, name: str) -> Phase:
    """A pass without gradients."""
    work = partial(passes.losses, batch=job.scoring, running=job.running)
    return scoring_phase(job, name, work, columns=False)


def _point(job: SelectJob, name: str, columns: bool) -> Phase:
    """The pass at a point of the path, by the displacement of the pieces around it, beside the sums of earlier ones."""
    by_token = job.settings.token_scores
    work = partial(
        passes.scores, batch=job.scoring, running=job.running, directions=1, columns=columns, by_token=by_token
    )
    phase = scoring_phase(job, name, work, directions=1, columns=columns, more={"direction": job.shards.directions})
    if not columns:
        return phase
    on_host = job.machine.device != "cpu"
    (phase.host if on_host else phase.held)["sums of earlier points"] = job.shards.sums
    # this point's columns, and the new sums, once the batches are gone
    return phase if on_host else replace(phase, step=2 * job.shards.sums)
