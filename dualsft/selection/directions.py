"""From statistics to the direction u, and from u and Σ_i g_i to the parameter scores, one parameter at a time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dualsft.errors import UserError, blaming
from dualsft.scorers import ParameterStatistics, Scorer
from dualsft.selection.statistics import Statistics
from dualsft.selection.validation_sets import Combination, combined
from dualsft.sharding.collectives import all_reduce_sum
from dualsft.sharding.shards import shard_copy, shard_of


@torch.no_grad()
def directions(scorer: Scorer, statistics: Statistics, step_size: float) -> dict[str, Tensor]:
    """U for every trainable parameter; of a sharded model, this rank's shard of it.

    Args:
        scorer: The rule for u.
        statistics: What is known.
        step_size: η.

    Raises:
        UserError: if a direction is not finite, or not of its parameter's shape.
    """
    chosen, weights = {}, dict(statistics.model.named_parameters())
    for known in statistics.by_parameter(step_size):
        with blaming(scorer, "direction"):
            u = scorer.direction(known)
        check_vector(scorer, "direction", u, known)
        chosen[known.name] = shard_copy(u, weights[known.name])
    return chosen


def check_vector(scorer: Scorer, method: str, found: object, known: ParameterStatistics) -> None:
    """See that what a scorer gave for a parameter can be worked with.

    Raises:
        UserError: naming the scorer, its method and the parameter.
    """
    vector = isinstance(found, Tensor) and found.is_floating_point() and found.shape == known.weight.shape
    if not vector or not bool(found.isfinite().all()):  # type: ignore[attr-defined]
        raise UserError(
            f"{type(scorer).__name__} gave {known.name} a {method} that is not finite or not of its shape "
            f"{tuple(known.weight.shape)}; mend the scorer."
        )


def masked(u: Mapping[str, Tensor], mask: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """U ⊙ m; parameters without a chosen weight are left out, so that no tap is spent on them.

    Args:
        u: By parameter name; of a sharded model, this rank's shards.
        mask: Which weights are chosen, of the parameters' whole shapes.
        like: The model's parameters by name.
    """
    return {n: u[n] * shard_of(chosen, like[n]).to(u[n].device) for n, chosen in mask.items() if bool(chosen.any())}


@dataclass(frozen=True)
class ColumnTotals:
    """What the parameter scores of one validation set add up to.

    Attributes:
        total: Σ_j φ_j.
        size: Σ_j |φ_j|.
    """

    total: float
    size: float


def column_totals(u: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> ColumnTotals:
    """Σ_j u_j Σ_i g_ij, and the size of its summands."""
    return _together([_totals(_score(u, sums, name)) for name in u])


def parameter_scores(
    us: Sequence[Mapping[str, Tensor]], sums: Mapping[str, Tensor], combination: Combination
) -> tuple[dict[str, Tensor], list[ColumnTotals]]:
    """φ_j = u_j Σ_i g_ij of every weight, the validation sets combined, and what each set's add up to.

    Args:
        us: u of each validation set, by parameter name.
        sums: Σ_i g_i by parameter name.
        combination: How the sets' scores become one.

    Returns:
        Parameter name -> φ_j, float32, of the parameter's (shard's) shape, on the host; totals in the order of ``us``.
    """
    scores = {}
    totals: list[list[ColumnTotals]] = [[] for _ in us]
    for name in us[0]:
        found = [_score(u, sums, name) for u in us]
        for k, score in enumerate(found):
            totals[k].append(_totals(score))
        scores[name] = combined(found, combination).float().cpu()
    return scores, [_together(of) for of in totals]


def _score(u: Mapping[str, Tensor], sums: Mapping[str, Tensor], name: str) -> Tensor:
    return sums[name].to(u[name].device) * u[name]


def _totals(score: Tensor) -> ColumnTotals:
    return ColumnTotals(float(score.sum(dtype=torch.float64)), float(score.abs().sum(dtype=torch.float64)))


def _together(totals: Sequence[ColumnTotals]) -> ColumnTotals:
    here = [math.fsum(of.total for of in totals), math.fsum(of.size for of in totals)]
    return ColumnTotals(*all_reduce_sum(torch.tensor(here, dtype=torch.float64)).tolist())
