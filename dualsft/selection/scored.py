"""The scores of both sides in a run's files, in the place of everything that they were made from.

Where each side is scored once, nothing is computed after that: the scoring checkpoint, the second moment, directions
and sums are dropped as soon as the scores are kept. What is left to do, another run can do without them: the budgets,
which may be other ones, and the selection directory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dualsft.matrix.pass_result import GradientPass, Statistic
from dualsft.models import PreTrainedModel
from dualsft.models.lazy import under
from dualsft.runs.folder import RunFolder
from dualsft.runs.progress import PhaseLog, say
from dualsft.selection.order import ScoresBothSides
from dualsft.selection.outcome import Outcome
from dualsft.selection.passes import HALVED, Passes
from dualsft.selection.scoring import ExampleScores
from dualsft.selection.step import BOUND, StepSize, bind, is_bound
from dualsft.selection.weight_scores import stored_weight_scores, write_weight_scores
from dualsft.sharding.collectives import on_rank_zero
from dualsft.storage.checksums import check_file, file_checksum

_PHASE = "scored"
_NO_COUNTS: dict[str, Any] = {"counted": 0, "nonfinite": [], "covered": []}


@dataclass(frozen=True)
class Scored:
    """The scores of both sides, and what is told of them.

    Attributes:
        weights: The folder of the φ_j; None where no weight has a score.
        examples: The φ_i.
        outcome: What is told of them.
        checksums: Of the files of the φ_j, by name.
    """

    weights: Path | None
    examples: ExampleScores
    outcome: Outcome
    checksums: dict[str, str]


def keep_scores(
    run: RunFolder,
    log: PhaseLog,
    model: PreTrainedModel,
    passes: Passes,
    scoring: ScoresBothSides,
    weights: Mapping[str, Tensor],
    examples: ExampleScores,
) -> Scored:
    """Keep what `ScoresBothSides.both` has given, and drop every other state of the run."""
    outcome = Outcome.of(scoring)  # before the sums are gone
    folder = write_weight_scores(run, model, weights, replaces=passes.unsaved)
    scored = Scored(folder, examples, outcome, on_rank_zero(lambda: _checksums(folder)))
    kept = {"phases": log.as_json(), "checksums": scored.checksums, "sets": list(examples.by_set)}
    run.save(_PHASE, _tensors(examples, outcome), {**outcome.notes(), **kept})
    drop_all_but_scores(run)
    return scored


def drop_all_but_scores(run: RunFolder) -> None:
    """Drop the states that the scores were made from."""
    run.drop_all(but=(_PHASE, HALVED, BOUND))


def kept_scores(run: RunFolder, log: PhaseLog, step_size: StepSize) -> Scored | None:
    """The scores that an earlier run has kept, if it has come so far; what they cost goes to the log.

    Raises:
        UserError: if they depend on another step size.
    """
    if (saved := run.load(_PHASE)) is None:
        return None
    tensors, notes = saved
    if not on_rank_zero(lambda: _is_sound(stored_weight_scores(run), notes["checksums"])):
        say("the scores of weights that an earlier run kept are damaged: everything is computed again.")
        run.drop(_PHASE)
        return None
    drop_all_but_scores(run)  # a kill may have come before
    if is_bound(run):
        bind(run, step_size)
    for phase in notes["phases"]:
        log.restore(phase)
    examples, measured = _from_tensors(tensors, notes["sets"])
    folder = stored_weight_scores(run) if notes["checksums"] else None
    return Scored(folder, examples, Outcome.from_notes(notes, measured), notes["checksums"])


def _checksums(folder: Path | None) -> dict[str, str]:
    return {path.name: file_checksum(path) for path in sorted(folder.iterdir())} if folder else {}


def _is_sound(folder: Path, checksums: Mapping[str, str]) -> bool:
    """Whether the files of the scores hold the bytes that were written."""
    try:
        for name, checksum in checksums.items():
            check_file(folder / name, checksum)
    except (OSError, ValueError):
        return False
    return True


def _tensors(examples: ExampleScores, outcome: Outcome) -> dict[str, Tensor]:
    """The examples' scores and measurements as named tensors."""
    tokens = [{i: examples.tokens[i] for i in examples.scores}] if examples.tokens else []
    together, _ = GradientPass({}, [examples.scores], tokens, outcome.measured).state()
    by_set, _ = GradientPass({}, [*examples.by_set.values()]).state()
    return {f"all:{n}": t for n, t in together.items()} | {f"set:{n}": t for n, t in by_set.items()}


def _from_tensors(tensors: Mapping[str, Tensor], sets: list[str]) -> tuple[ExampleScores, dict[str, Statistic]]:
    """The examples' scores and measurements that `_tensors` was made of."""
    together = GradientPass.from_state(under("all", tensors), _NO_COUNTS)
    by_set = GradientPass.from_state(under("set", tensors), _NO_COUNTS).rows
    tokens = together.tokens[0] if together.tokens else {}
    return ExampleScores(together.rows[0], dict(zip(sets, by_set, strict=True)), tokens), together.measured
