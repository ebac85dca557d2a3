"""Refuses options of `dualsft select` that contradict themselves or one another, before any work."""

import math
import re
from collections.abc import Collection, Sequence
from typing import Literal, get_args

from dualsft.allocators import DataAllocator, ExampleStatistic, ParameterAllocator, ParameterStatistic
from dualsft.errors import UserError, blaming
from dualsft.objectives import Objective
from dualsft.paths.base import PathStatistic, PieceStatistic
from dualsft.scorers import Scorer, SecondOrderScorer, Statistic
from dualsft.selection.normalization import Normalize
from dualsft.selection.paths.settings import PathSettings
from dualsft.selection.step import StepSize
from dualsft.selection.warmup import Warmup

Order = Literal["both", "parameters", "data", "parameters_then_data", "data_then_parameters"]
_TAKEN = r"(validation|pool|chosen)(-|$)"
"""Beginnings of names that other passes have."""


def check_preconditioner(preconditioner: str, second_moment: bool) -> None:
    """Refuse a preconditioner whose second moment cannot be computed."""
    if preconditioner == "adam" and not second_moment:
        raise UserError(
            "model.preconditioner is adam, which needs the second moment of a warm-up, but model.warmup.fraction is 0; "
            "set model.preconditioner to none, or give model.warmup.fraction or model.warmup.checkpoint."
        )


def check_needs(scorer: Scorer, second_moment: bool) -> None:
    """Refuse a scorer whose statistics cannot be computed."""
    _check_known(scorer, scorer.needs, get_args(Statistic))
    if "second_moment" in scorer.needs and not second_moment:
        raise UserError(
            f"The scorer {type(scorer).__name__} needs the second moment of a warm-up, but model.warmup.fraction is 0; "
            "give model.warmup.fraction or model.warmup.checkpoint, or another source of curvature (diagonal_fisher: "
            "empirical_fisher)."
        )


def check_path(
    path: PathSettings, warmup: Warmup, normalize: str, prior_weight: float, objectives: Sequence[Objective]
) -> None:
    """Refuse a path that contradicts itself, with nothing to train on, or whose statistics cannot be computed."""
    rule = path.along
    if normalize not in get_args(Normalize):
        raise UserError(f"model.normalize is {normalize!r}; give one of {', '.join(get_args(Normalize))}.")
    if rule is None:
        return
    _check_known(rule, rule.needs, get_args(PathStatistic))
    _check_known(rule, rule.needs_of_examples, get_args(PieceStatistic))
    name = type(rule).__name__
    if rule.trains_on not in ("target", "pool"):
        raise UserError(f"{name} has trains_on {rule.trains_on!r}; it is 'target' or 'pool'; mend it.")
    if rule.is_complete and (needs := [*rule.needs, *rule.needs_of_examples]):
        raise UserError(
            f"{name} needs {needs[0]}, which is measured only where a path has directions of its own; define its "
            "direction too."
        )
    if path.normalize in ("initial_loss", "smoothed_loss") and not rule.is_complete:
        raise UserError(
            f"model.path.normalize is {path.normalize}, but {name} does not score by falls of the loss; give none or "
            "length."
        )
    if rule.is_complete:
        _check_falls(name, normalize, prior_weight, objectives)
    if rule.trains_on == "pool" and warmup.keep:
        raise UserError(f"model.warmup.keep is set, but {name} is a path in place of the warm-up; drop it.")
    if not rule.adds_rows and normalize != "none":
        raise UserError(
            f"model.normalize is {normalize}, but {name} says itself what its pieces add to the scores; set it to none."
        )
    if rule.trains_on == "pool" and (warmup.fraction == 0 or warmup.checkpoint is not None):
        raise UserError(
            f"{name} is the path of a warm-up, but none is made; give model.warmup.fraction, and no "
            "model.warmup.checkpoint."
        )
    if rule.needs and path.optimizer == "sgd":
        raise UserError(f"model.path.optimizer is sgd, but {name} uses the second moment of adamw; set it to that.")


def _check_falls(name: str, normalize: str, prior_weight: float, objectives: Sequence[Objective]) -> None:
    """Refuse what has no part in scores that are falls of the loss alone."""
    if normalize != "none":
        raise UserError(
            f"model.normalize is {normalize}, but along {name} the scores are falls of the loss; set "
            "model.path.normalize instead."
        )
    if prior_weight:
        raise UserError(
            f"model.prior.weight is {prior_weight}, but along {name} the scores are falls of the loss, without a "
            "prior; set it to 0."
        )
    if objectives:
        raise UserError(
            f"model.objectives has {type(objectives[0]).__name__}, but along {name} the scores are falls of the loss "
            "alone; leave it out."
        )


def check_contributions(path: PathSettings, order: Order, rounds: int, token_scores: bool) -> None:
    """Refuse what takes sums over weights or tokens where a path adds up something else."""
    rule = path.along
    if rule is None or rule.adds_rows:
        return
    name = type(rule).__name__
    if token_scores:
        raise UserError(
            f"model.token_scores is set, but {name} says itself what its pieces add to the scores, which are no sums "
            "over tokens; drop it."
        )
    if rule.is_complete and (order == "parameters_then_data" or rounds > 1):
        raise UserError(
            f"model.order {order} with model.rounds {rounds} scores examples by the chosen weights alone, but {name} "
            "scores by all weights; set model.order to both, or to data_then_parameters with one round."
        )


def check_step_size(setting: StepSize, scorer: Scorer) -> None:
    """Refuse a step size that cannot be used."""
    if setting == "auto" and not isinstance(scorer, SecondOrderScorer):
        raise UserError(
            f"model.step_size is auto, but the scorer {type(scorer).__name__} has no curvature to bound a step; give "
            "a number, or a second-order scorer (diagonal_fisher, hessian_vector)."
        )
    number = isinstance(setting, (int, float)) and not isinstance(setting, bool)
    if setting != "auto" and not (number and 0 < float(setting) < math.inf):
        raise UserError(f"model.step_size is {setting}; give a positive number, or auto.")


def check_order(order: Order, rounds: int) -> None:
    """Refuse an unknown order, and rounds that the order does not have."""
    if order not in get_args(Order):
        raise UserError(f"model.order is {order!r}; give one of {', '.join(get_args(Order))}.")
    if rounds < 1:
        raise UserError(f"model.rounds is {rounds}; give at least 1.")
    if rounds > 1 and "then" not in order:
        raise UserError(
            f"model.rounds is {rounds}, but with model.order {order} nothing is re-scored; set model.order to "
            "parameters_then_data or data_then_parameters, or model.rounds to 1."
        )


def check_allocators(parameters: ParameterAllocator, data: DataAllocator) -> None:
    """Refuse an allocator that needs a statistic, or counts in a unit, that does not exist."""
    _check_known(parameters, parameters.needs, get_args(ParameterStatistic))
    _check_known(data, data.needs, get_args(ExampleStatistic))
    if data.unit not in ("examples", "tokens"):
        raise UserError(f"{type(data).__name__} has unit {data.unit!r}; it is 'examples' or 'tokens'; mend it.")


def check_stability(stability: bool, path: PathSettings) -> None:
    """Refuse halves of the validation set along a path, which may be trained on that set."""
    if stability and path.along is not None:
        raise UserError(
            "model.stability is set, but halves of the validation set score at one scoring checkpoint only, not along "
            "a path; drop it, or model.path.along."
        )


def check_objectives(objectives: Sequence[Objective]) -> None:
    """Refuse terms without a finite weight, or whose name is taken or unfit for a file name."""
    for objective in objectives:
        with blaming(objective, "name, or weight,"):
            finite, _ = math.isfinite(objective.weight), str(objective.name)
        if not finite:
            raise UserError(f"{type(objective).__name__} has the weight {objective.weight}; give it a finite one.")
    names = [objective.name for objective in objectives]
    if odd := [name for name in names if not re.fullmatch(r"[\w-]+", name) or re.match(_TAKEN, name)]:
        raise UserError(
            f"A term of the objective has the name {odd[0]!r}; give it one of letters, digits, '_' and '-' that does "
            "not begin with validation, pool or chosen."
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"Several terms of the objective have the name {twice[0]!r}; give those in model.objectives names of their "
            "own."
        )


def _check_known(part: object, needs: object, known: Sequence[str]) -> None:
    """Refuse a scorer or an allocator that needs a statistic that is not computed."""
    name = type(part).__name__
    if isinstance(needs, str) or not isinstance(needs, Collection):
        raise UserError(f"{name} has needs {needs!r}; give a tuple of names, such as {tuple(known[:1])}.")
    if strange := [need for need in needs if need not in known]:
        raise UserError(
            f"{name} needs {', '.join(map(str, strange))}, which is none of {', '.join(sorted(known))}; mend it."
        )
