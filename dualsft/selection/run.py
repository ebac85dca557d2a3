"""The method on one page: from a base model, a pool and a validation set to a selection directory.

    1. check the input, and claim the output folder                                          module.py, budgets.py
    2. warm up                θ, and Adam's second moment ĉ                                  scoring_checkpoint.py
    3. differentiate V        v = ∇V(θ), and its curvature where the scorer uses it          objective.py
    4. direction              u = η/n P ⊙ (v − ½ η H (P ⊙ ḡ)), or as another scorer defines  directions.py
    5. rows and columns       φ_i = <u, g_i>  and  φ_j = u_j Σ_i g_ij                        scoring.py
    6. budgets                a subset of the examples, a mask of the weights                budgets.py
    7. write                  the selection directory                                        writing.py

Along a path (`paths/`) steps 2 to 5 are taken at each of its points, and added up.
Steps 4 to 6 are taken once for both sides, or for one side after the other, each scored by the latest choice of the
other (`order.py`). Every pass over data is a phase: resumed where it was killed, never repeated (`passes.py`). What its
result rests on is dropped once the result is kept (`combined_objective.py`, `scored.py`).
Source: arXiv 2605.06166.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

from dualsft.data.module import InstructionDataModule
from dualsft.models.loading import base_weights
from dualsft.runs.folder import RunFolder
from dualsft.runs.progress import PhaseLog
from dualsft.selection.artifact import Selection, load_selection
from dualsft.selection.budgets import Budgets
from dualsft.selection.calibration import calibrate
from dualsft.selection.combined_objective import CombinedObjective, can_combine
from dualsft.selection.describe import (
    describe_configuration,
    describe_inputs,
    describe_outcome,
    what_scores_rest_on,
    working_directory,
)
from dualsft.selection.diagnostics import Basis, describe_target, row_sources
from dualsft.selection.known_objective import KnownObjective
from dualsft.selection.objective import ValidationObjective
from dualsft.selection.order import Chosen, ScoresBothSides, choose_by_turns
from dualsft.selection.outcome import Outcome
from dualsft.selection.overlap import tell_of_data
from dualsft.selection.passes import Passes
from dualsft.selection.paths.run import walk_path
from dualsft.selection.phase_plan import count_phases
from dualsft.selection.scored import keep_scores, kept_scores
from dualsft.selection.scorer_directions import ScorerDirections
from dualsft.selection.scoring import Scoring
from dualsft.selection.scoring_checkpoint import drop_second_moment, reach_scoring_checkpoint, warmup_steps
from dualsft.selection.tables import example_table, token_table
from dualsft.selection.terms import make_further_terms, validation_halves, validation_terms
from dualsft.selection.weight_scores import link_weight_scores, write_weight_scores
from dualsft.selection.writing import publish, write_selection
from dualsft.sharding.collectives import all_gather, on_rank_zero
from dualsft.sharding.shards import compute_device
from dualsft.storage.writing import writing_to

if TYPE_CHECKING:
    from dualsft.selection.module import SelectionModule


def run_selection(
    module: "SelectionModule", data: InstructionDataModule, run: RunFolder, seed: int, config: str, show: bool
) -> Selection:
    """Select examples and weights, resuming from the finished parts of an earlier, killed run.

    Args:
        module: The model and the settings.
        data: The pool and the validation sets, set up.
        run: The output folder.
        seed: Decides which examples the warm-up and the prior draw, and their order.
        config: YAML that replays the run, kept beside the results.
        show: Whether to draw progress bars.
    """
    model, settings, pool = module.model, module.settings, data.train_examples

    # 1. Nothing is written before the input is known to be good.
    module.check_input(data)
    tell_of_data(data)
    inputs = on_rank_zero(lambda: describe_inputs(module, data, seed))
    budgets = Budgets(settings, model, data, run, lambda: base_weights(module.model_name_or_path, module.dtype_name))
    if on_rank_zero(lambda: run.complete):
        finished = load_selection(run.path)
        on_rank_zero(lambda: run.confirm(inputs, finished.manifest))
        return finished
    configuration = on_rank_zero(lambda: describe_configuration(module, data))
    run.claim({**what_scores_rest_on(module, inputs), **configuration})
    log = PhaseLog(show, compute_device(model), count_phases(settings, len(data.validation_sets)))
    passes = Passes(model, run, log, settings, data)
    calibrate(model, data.cache_dir)

    # 2. to 6. The scoring checkpoint, directions, rows and columns, budgets.
    opened = partial(open_scoring, module, data, passes, run, log, seed)
    checksums: dict[str, str] = {}
    if "then" in settings.order:  # each side is scored by the choice of the other
        scoring, write = opened(), partial(write_weight_scores, run, model)
        chosen = choose_by_turns(settings.order, settings.rounds, scoring, budgets, pool.ok_ids(), write)
        outcome = Outcome.of(scoring)
    else:  # nothing is computed once both sides have their scores
        if (scored := kept_scores(run, log, settings.step_size)) is None:
            scoring = opened()
            scored = keep_scores(run, log, model, passes, scoring, *scoring.both())
            del scoring  # its directions leave the device before the choice
        outcome, examples, checksums = scored.outcome, scored.examples, scored.checksums
        mask = budgets.mask(scored.weights)
        chosen = Chosen(scored.weights, mask, examples, *budgets.examples(examples.scores, outcome.measured))

    # 7. The selection directory.
    cost = {"scoring_batch_tokens": min(all_gather(passes.batch_tokens)), "phases": log.as_json()}
    origin = {**configuration, "directory": working_directory()}
    known = {"checksums": checksums} if settings.parameter_scores == "full" else {}
    manifest = {**inputs, **describe_outcome(model, data, chosen, outcome), **cost, **origin, **known}
    write_results(module, data, run, chosen, outcome, seed, manifest=manifest, config=config)
    return load_selection(run.path)


def write_results(
    module: "SelectionModule",
    data: InstructionDataModule,
    run: RunFolder,
    chosen: Chosen,
    outcome: Outcome,
    seed: int,
    **parts: Any,
) -> None:
    """Write the selection directory, its other ``parts`` as they are, and end the run."""
    settings, records, staged = module.settings, data.train_examples.records, run.staging()

    def write() -> None:
        if chosen.parameter_scores is not None:
            with writing_to(run.path):
                link_weight_scores(chosen.parameter_scores, staged)
        sources = row_sources(records, settings.data_allocator)
        target = describe_target(data.validation_sets.values(), sources.column if sources else None)
        write_selection(
            staged,
            examples=example_table(data, chosen, outcome),
            kept=settings.parameter_scores,
            mask=chosen.mask,
            selected_lines=[records.line(i) for i in sorted(chosen.examples)],
            token_scores=token_table(data, chosen) if settings.token_scores else None,
            sketches=outcome.sketches,
            sources=sources,
            basis=Basis(target, outcome.alignment, warmup_steps(settings, data, seed), outcome.stability),
            **parts,
        )
        publish(staged, run.path)

    on_rank_zero(write)
    run.finish()


def open_scoring(
    module: "SelectionModule", data: InstructionDataModule, passes: Passes, run: RunFolder, log: PhaseLog, seed: int
) -> ScoresBothSides:
    """Open what scores both sides: at one scoring checkpoint, or along a path."""
    along_path = module.settings.path.along is not None
    return (walk_path if along_path else score_at_checkpoint)(module, data, passes, run, log, seed)


def score_at_checkpoint(
    module: "SelectionModule", data: InstructionDataModule, passes: Passes, run: RunFolder, log: PhaseLog, seed: int
) -> ScoresBothSides:
    """Reach the scoring checkpoint, differentiate V there, and open what scores by the scorer's directions."""
    model, settings = module.model, module.settings
    # 2. The scoring checkpoint.
    moments = reach_scoring_checkpoint(model, settings, data, run, log, seed)
    # 3. The validation objective.
    terms, further = validation_terms(data), make_further_terms(module, data, seed)
    objective: KnownObjective
    if can_combine(settings, len(terms)):
        known = moments if settings.preconditions else None
        objective = combined = CombinedObjective(model, passes, run, log, terms, further, known)
        combined.take_gradients()
        drop_second_moment(run)
    else:
        halves = validation_halves(data, seed) if settings.stability else {}
        objective = full = ValidationObjective(model, settings, passes, terms, further, moments, halves)
        full.take_gradients()
    # 4. The directions.
    rule = ScorerDirections(settings, objective, run, data.named_validation)
    return Scoring(model, settings, rule, passes, data, unsaved="then" not in settings.order)
