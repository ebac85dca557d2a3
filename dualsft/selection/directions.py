"""Computes u from statistics, and the parameter scores from u and Σ_i g_i, one parameter at a time.

With several validation sets each has its own direction and scores, and a combination of the scores decides.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dualsft.errors import UserError
from dualsft.matrix.example_values import ExampleValues
from dualsft.models.dtypes import accumulator_dtype
from dualsft.models.lazy import LazyTensors
from dualsft.needs import ask
from dualsft.scorers import ParameterStatistics, Scorer
from dualsft.selection.dense_training import EPS
from dualsft.sharding.collectives import sum_of_shards
from dualsft.sharding.shards import full_tensor, local_shard, shard_copy

Combination = Literal["mean", "max", "min"]


@dataclass(frozen=True)
class Statistics:
    """The tensors known at the scoring checkpoint for one validation set; see `ParameterStatistics` for the symbols.

    Every mapping is by parameter name, and may make its tensors when they are asked for. Of a sharded model the tensors
    are this rank's shards.

    Attributes:
        model: The model at the scoring checkpoint.
        validation_gradient: v.
        preconditioner: P.
        num_examples: n.
        pool_gradient: ḡ, if it is known.
        second_moment: ĉ, if the scorer needs it.
        empirical_fisher: The mean squared gradient of the validation examples, if the scorer needs it.
        hessian_vector: H (P ⊙ ḡ), if the scorer needs it.
    """

    model: nn.Module
    validation_gradient: Mapping[str, Tensor]
    preconditioner: Mapping[str, Tensor]
    num_examples: int
    pool_gradient: Mapping[str, Tensor] | None = None
    second_moment: Mapping[str, Tensor] | None = None
    empirical_fisher: Mapping[str, Tensor] | None = None
    hessian_vector: Mapping[str, Tensor] | None = None

    @contextmanager
    def of_parameter(self, name: str, step_size: float) -> Iterator[ParameterStatistics]:
        """What a scorer, called in this context, gets of one trainable parameter: full tensors, for the step size η.

        A scorer that modifies the weights is refused; all other tensors are copies.
        """
        optional = (self.pool_gradient, self.second_moment, self.empirical_fisher, self.hessian_vector)
        weight = self.model.get_parameter(name)
        version, dtype = weight._version, accumulator_dtype(weight)
        yield ParameterStatistics(
            name,
            full_tensor(local_shard(weight.detach()), weight),
            full_tensor(self.validation_gradient[name], weight),
            full_tensor(self.preconditioner[name], weight),
            step_size,
            self.num_examples,
            *(
                None if known is None else full_tensor(known[name].to(weight.device, dtype, copy=True), weight)
                for known in optional
            ),
        )
        if weight._version != version:
            raise UserError(f"The scorer modified the weight {name} in place; mend it to work on a copy.")


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def preconditioner(model: nn.Module, moments: Mapping[str, Tensor] | None) -> LazyTensors:
    """P = 1/(sqrt(ĉ)+eps) by parameter name, or P = 1 without ĉ, on the model's device; each is made when it is read.

    ĉ may be on any device; P has the type of the parameter's sums, and of a sharded model is this rank's shard.
    """
    weights = trainable_parameters(model)

    def make(name: str) -> Tensor:
        weight = weights[name]
        dtype = accumulator_dtype(weight)
        if moments is None:
            return torch.ones_like(local_shard(weight.detach()), dtype=dtype)
        return moments[name].to(weight.device, dtype).sqrt().add_(EPS).reciprocal_()

    return LazyTensors(weights, make)


def scorer_direction(scorer: Scorer, statistics: Statistics, step_size: float) -> LazyTensors:
    """u at the step size η for every trainable parameter, computed when it is read; this rank's shard if sharded.

    Reading raises a UserError if the direction is not finite, or not of its parameter's shape.
    """
    weights = trainable_parameters(statistics.model)

    @torch.no_grad()
    def make(name: str) -> Tensor:
        with statistics.of_parameter(name, step_size) as known:
            u = ask(scorer, "direction", known)
        check_vector(scorer, "direction", u, name, known.weight)
        return shard_copy(u, weights[name])

    return LazyTensors(weights, make)


def check_vector(scorer: object, method: str, found: object, name: str, weight: Tensor) -> None:
    """Check that a scorer, or a path, returned a finite tensor of the parameter's shape."""
    due = f"where a tensor of floating point and shape {tuple(weight.shape)} is due"
    if not isinstance(found, Tensor):
        problem = f"that is a {type(found).__name__}, {due}"
    elif not found.is_floating_point() or found.shape != weight.shape:
        problem = f"of {found.dtype} and shape {tuple(found.shape)}, {due}"
    elif not bool(found.isfinite().all()):
        problem = "that is not finite"
    else:
        return
    raise UserError(f"{type(scorer).__name__} gave {name} a {method} {problem}; mend it.")


class ColumnTotals(NamedTuple):
    """Σ_j φ_j and Σ_j |φ_j| of one validation set."""

    total: float
    size: float


def column_totals(u: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> ColumnTotals:
    """Add up φ_j = u_j Σ_i g_ij over all weights of all ranks, and their absolute values."""
    totals, sizes = [], []
    for name in u:  # one tensor's scores at a time
        score = _score(u, sums, name)
        totals.append(float(score.sum(dtype=torch.float64)))
        sizes.append(float(score.abs().sum(dtype=torch.float64)))
    total, size = math.fsum(totals), math.fsum(sizes)
    return ColumnTotals(*sum_of_shards(torch.tensor([total, size], dtype=torch.float64)).tolist())


def parameter_scores(
    us: Sequence[Mapping[str, Tensor]], sums: Mapping[str, Tensor], combination: Combination
) -> LazyTensors:
    """φ_j = u_j Σ_i g_ij of every weight, the validation sets combined, computed when it is read.

    Returns:
        Parameter name -> φ_j, float32, of the parameter's (shard's) shape, on the host. Rank zero of replicas
        chooses by them, and holds them; on the others each is computed when it is read.
    """
    return LazyTensors(us[0], lambda name: combined([_score(u, sums, name) for u in us], combination).float().cpu())


def _score(u: Mapping[str, Tensor], sums: Mapping[str, Tensor], name: str) -> Tensor:
    part = u[name]
    return sums[name].to(part.device) * part


def combined(values: Sequence[Float[Tensor, "*shape"]], combination: Combination) -> Float[Tensor, "*shape"]:
    """Combine the validation sets' values of the same things: their mean, or the largest or smallest of each."""
    if len(values) == 1:
        return values[0]
    stacked = torch.stack(list(values))
    if combination == "mean":
        return stacked.mean(0)
    return stacked.amax(0) if combination == "max" else stacked.amin(0)


def combined_rows(rows: Sequence[ExampleValues], combination: Combination) -> ExampleValues:
    """Combine the validation sets' scores of each example, which all have in the same order."""
    return ExampleValues(rows[0].ids, combined([torch.from_numpy(of.numbers) for of in rows], combination).numpy())


def combined_tokens(
    tokens: Sequence[Mapping[int, Tensor]], rows: Sequence[ExampleValues], combination: Combination
) -> dict[int, Tensor]:
    """Combine the contributions of each example's tokens, by example id; they add up to its combined score.

    Where the largest or smallest score is taken, they are the contributions to that set's score.
    """
    if not tokens:
        return {}
    if combination == "mean":
        return {i: torch.stack([of[i] for of in tokens]).mean(0) for i in tokens[0]}
    best = max if combination == "max" else min
    deciding = {i: [of[i] for of in rows].index(best(of[i] for of in rows)) for i in tokens[0]}
    return {i: tokens[k][i] for i, k in deciding.items()}
