"""Walks the path of a run, and opens what scores along it."""

from typing import TYPE_CHECKING

from dualsft.data.module import InstructionDataModule
from dualsft.errors import UserError
from dualsft.runs.folder import RunFolder
from dualsft.runs.progress import PhaseLog
from dualsft.selection.order import ScoresBothSides
from dualsft.selection.passes import Passes
from dualsft.selection.paths.checkpoints import CheckpointScoring
from dualsft.selection.paths.ending import walk_paths
from dualsft.selection.paths.scoring import PathScoring
from dualsft.selection.scoring_checkpoint import reach_scoring_checkpoint
from dualsft.selection.terms import make_further_terms, validation_terms

if TYPE_CHECKING:
    from dualsft.selection.module import SelectionModule


def walk_path(
    module: "SelectionModule", data: InstructionDataModule, passes: Passes, run: RunFolder, log: PhaseLog, seed: int
) -> ScoresBothSides:
    """Walk the path that the settings describe, along the target from the scoring checkpoint on."""
    model, settings, rule = module.model, module.settings, module.settings.path_rule
    if not rule.is_complete and rule.trains_on == "target" and len(data.validation_sets) > 1:
        raise UserError(
            f"{type(rule).__name__} has directions of its own on the path to one validation set, but there are "
            "several; give data.validation one source."
        )
    if rule.trains_on == "target":
        reach_scoring_checkpoint(model, settings, data, run, log, seed)
    paths = walk_paths(model, settings, data, passes, run, log, seed)
    if rule.is_complete:
        return PathScoring(model, settings, data, passes, paths)
    terms = (validation_terms(data), make_further_terms(module, data, seed))
    ended = next(iter(paths.values()))  # the same for all sets
    return CheckpointScoring(model, settings, data, passes, run, log, ended, terms)
