"""Scores by token of a few examples alone: the scoring checkpoint and u as a selection had them, then one short pass.

With θ and u the same, a token's share of <u, g_i> is too. What a scorer needs of the pool is computed again: nothing
for a first-order one, ḡ for others.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from dualsft.data.module import InstructionDataModule
from dualsft.errors import UserError
from dualsft.models.lazy import LazyTensors
from dualsft.runs.folder import RunFolder
from dualsft.runs.progress import PhaseLog
from dualsft.selection.directions import combined_tokens
from dualsft.selection.held_direction import HeldDirection
from dualsft.selection.objective import ValidationObjective
from dualsft.selection.passes import Passes
from dualsft.selection.scorer_directions import ScorerDirections
from dualsft.selection.scoring_checkpoint import reach_scoring_checkpoint
from dualsft.selection.terms import make_further_terms, validation_terms
from dualsft.sharding.shards import compute_device

if TYPE_CHECKING:
    from dualsft.selection.module import SelectionModule

TokenScores = dict[int, tuple[list[int], list[float]]]
"""Example id -> its token ids and their scores."""


def score_tokens(
    module: "SelectionModule", data: InstructionDataModule, run: RunFolder, seed: int, ids: Sequence[int], show: bool
) -> TokenScores:
    """Score the tokens of some examples of the pool.

    Args:
        module: The model and the settings of the selection.
        data: The pool and the validation sets, set up.
        run: A folder for the states of the passes.
        seed: The selection's.
        ids: Examples that can be scored.
        show: Whether to draw progress bars.

    Raises:
        UserError: if the examples' scores are sums along a path, are normalised, or rest on a choice of weights.
    """
    settings = module.settings
    if settings.path.along is not None or settings.normalize != "none" or settings.order not in ("both", "data"):
        raise UserError(
            "Scores by token are computed afterwards for model.order both or data, without a path and a normalisation "
            "only; make the selection again with model.token_scores: true."
        )
    run.claim({"command": "token scores"})
    log = PhaseLog(show, compute_device(module.model))
    passes = Passes(module.model, run, log, settings, data)
    moments = reach_scoring_checkpoint(module.model, settings, data, run, log, seed)
    further = make_further_terms(module, data, seed)
    objective = ValidationObjective(module.model, settings, passes, validation_terms(data), further, moments)
    objective.take_gradients()
    rule = ScorerDirections(settings, objective, run, data.named_validation)
    us = [HeldDirection(u, module.model).held for u in _directions(rule, passes, data)]
    options = {"directions": us, "columns": False, "by_token": True, "measurement": rule.measurement(())}
    found = passes.run("scores by token", len(ids), partial(data.pool_loader, list(ids)), **options)
    tokens = combined_tokens(found.tokens, found.rows, settings.combination)
    return {i: (list(data.train_examples.dataset[i]["input_ids"]), of.tolist()) for i, of in tokens.items()}


def _directions(rule: ScorerDirections, passes: Passes, data: InstructionDataModule) -> list[LazyTensors]:
    """u of each validation set; n is the number of examples that can be scored."""
    ids = data.train_examples.ok_ids()
    sums: Mapping[str, Tensor] | None = None
    count = len(ids)
    if rule.needs_pool_gradient:
        found = passes.run("pool gradient", count, partial(data.pool_loader, ids))
        sums, count = found.sums, found.counted
    return rule.directions(sums, count, "")
