"""The objective V_k(θ) of each validation set k, with its gradient, and its curvature as needed.

    V_k(θ) = mean_{i in validation set k} l_i(θ) + Σ_t λ_t mean_i L_t,i(θ)

The further terms t, such as the prior, are the same for every set, and one pass over each serves all sets. λ of the
validation loss is 1: a common factor of all terms scales all scores alike.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualsft.errors import UserError
from dualsft.matrix.curvature import (
    HessianVectorProduct,
    check_smooth,
    difference_step,
    displaced,
    twice_differentiable,
)
from dualsft.matrix.pass_result import GradientPass
from dualsft.matrix.sketches import Measurement
from dualsft.models import PreTrainedModel
from dualsft.models.lazy import LazyTensors
from dualsft.objectives.prior import SelfDistillation
from dualsft.scorers import SecondOrderScorer
from dualsft.selection.alignment import cosine
from dualsft.selection.directions import Statistics, preconditioner
from dualsft.selection.known_objective import KnownObjective
from dualsft.selection.passes import Passes
from dualsft.selection.settings import SelectionSettings
from dualsft.selection.terms import HESSIAN, Term

WeightedSum = tuple[float, Mapping[str, Tensor]]
"""A weight c and a sum G by parameter name, on the host or in files; it means c G."""


class ValidationObjective(KnownObjective):
    """V of each validation set at one scoring checkpoint, with the gradient of each term in the run's files.

    Args:
        model: The model at the scoring checkpoint.
        settings: The preconditioner, and the scorer, whose ``needs`` decide the passes.
        passes: Runs the passes over the terms.
        validation: Validation set -> its term.
        further: The terms that all sets share.
        moments: ĉ by parameter name, where the preconditioner or the scorer uses it.
        halves: Validation set -> the terms of its two halves, where each is to have a gradient of its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: SelectionSettings,
        passes: Passes,
        validation: Mapping[str, Term],
        further: Sequence[Term],
        moments: Mapping[str, Tensor],
        halves: Mapping[str, Sequence[Term]] | None = None,
    ) -> None:
        self._model, self._passes = model, passes
        self._needs = frozenset(settings.scorer.needs)
        self._validation, self._further, self._moments = validation, further, moments
        self._adam = settings.preconditions
        self.preconditioner = preconditioner(model, moments if self._adam else None)
        self._halves = halves or {}
        self._term_gradients: dict[Term, WeightedSum] = {}
        self._gradients: dict[str, Mapping[str, Tensor]] = {}
        self._fishers: dict[str, Mapping[str, Tensor]] = {}
        self.sets = list(validation)
        second_order = isinstance(settings.scorer, SecondOrderScorer)
        self.needs_pool_gradient = second_order or bool(self._needs & {"pool_gradient", *HESSIAN})

    def measurement(self, names: Collection[str]) -> Measurement:
        """The statistics to measure of single examples, under the preconditioner."""
        return Measurement(names, self.preconditioner if self._adam else None)

    def take_gradients(self) -> None:
        """Pass over every term for v, and if needed once more over the validation sets for the empirical Fisher."""
        for name, term in self._validation.items():
            self._term_gradients[term] = self._validation_gradient(name)
        self._term_gradients |= {term: self._pass(term, "gradient") for term in self._further}
        shared = [self._term_gradients[term] for term in self._further]
        self._gradients = {
            name: self._total([self._term_gradients[term], *shared]) for name, term in self._validation.items()
        }
        if "empirical_fisher" in self._needs:
            self._fishers = {
                name: self._total([self._pass(term, "squared gradient", squared=True)])
                for name, term in self._validation.items()
            }

    def _validation_gradient(self, name: str) -> WeightedSum:
        """The gradient of a set's loss: of one pass, or of one over each half."""
        if name not in self._halves:
            return self._pass(self._validation[name], "gradient")
        for half in self._halves[name]:
            self._term_gradients[half] = self._pass(half, "gradient")
        parts = [self._term_gradients[half] for half in self._halves[name]]
        counted = sum(round(1 / weight) for weight, _ in parts)
        return 1 / counted, self._total([(1.0, sums) for _, sums in parts])

    def half_gradients(self, name: str) -> list[Mapping[str, Tensor]]:
        """The gradients of V with each half of a validation set in the place of all of it; empty without halves."""
        shared = [self._term_gradients[term] for term in self._further]
        return [self._total([self._term_gradients[half], *shared]) for half in self._halves.get(name, ())]

    def prior_cosines(self) -> dict[str, float | None]:
        """Validation set -> the cosine of its loss's gradient with the prior's; None without a prior, or where zero."""
        priors = [self._term_gradients[term] for term in self._further if term.kind == SelfDistillation.name]
        return {
            name: cosine(self._term_gradients[term][1], priors[0][1]) if priors else None
            for name, term in self._validation.items()
        }

    def statistics(
        self, pool_sums: Mapping[str, Tensor] | None, num_examples: int, occasion: str = ""
    ) -> dict[str, Statistics]:
        """Collect the statistics of each set, with passes for products with the Hessian along P ⊙ ḡ if they are needed.

        Args:
            pool_sums: Σ_i g_i by parameter name; None if it is not known yet.
            num_examples: n, how many examples it is over, or will be.
            occasion: Suffix that tells the passes' names from earlier ones'.
        """
        pool = None if pool_sums is None else self._total([(1 / num_examples, pool_sums)])
        products = {} if pool is None else self._hessian_vectors(pool, occasion)
        return {
            name: Statistics(
                self._model,
                self._gradients[name],
                self.preconditioner,
                num_examples,
                pool,
                self._moments if "second_moment" in self._needs else None,
                self._fishers.get(name),
                products.get(name),
            )
            for name in self.sets
        }

    def _hessian_vectors(self, pool: Mapping[str, Tensor], occasion: str) -> dict[str, Mapping[str, Tensor]]:
        """H (P ⊙ ḡ) of each set."""
        if not self._needs & HESSIAN:
            return {}
        # in the weights' own type, in which it is multiplied with the second derivative
        direction = {n: (p * pool[n]).to(self._model.get_parameter(n).dtype) for n, p in self.preconditioner.items()}
        own = {name: self._product(term, direction, occasion) for name, term in self._validation.items()}
        shared = [part for term in self._further for part in self._product(term, direction, occasion)]
        return {name: self._total([*parts, *shared]) for name, parts in own.items()}

    def _product(self, term: Term, direction: Mapping[str, Tensor], occasion: str) -> list[WeightedSum]:
        """A term's share of H d, by the method that the scorer asks for."""
        if "hessian_vector" in self._needs:
            derivative = HessianVectorProduct(self._model, direction)
            around = partial(twice_differentiable, self._model)
            name = f"Hessian-vector product{occasion}"
            return [self._pass(term, name, around, derivative=derivative, shards=derivative.shards)]
        return self._difference(term, direction, occasion)

    def _difference(self, term: Term, direction: Mapping[str, Tensor], occasion: str) -> list[WeightedSum]:
        """A term's share of H d, as the central difference of two gradients; refused where the gradient jumps."""
        step = difference_step(self._model, direction)
        (weight, forward), (other, backward) = (
            self._pass(
                term,
                f"gradient a step {way}{occasion}",
                partial(displaced, self._model, direction, sign * step),
                displaced_weights=True,
            )
            for sign, way in ((1, "forward"), (-1, "backward"))
        )
        here, gradient = self._term_gradients[term]
        if not weight == other == here:
            raise UserError(
                f"Some examples of the {term.kind} are finite at the scoring checkpoint but not near it, so there is "
                "no finite difference; set the scorer's method to exact."
            )
        check_smooth(forward, backward, gradient, term.kind)
        return [(weight / (2 * step), forward), (-weight / (2 * step), backward)]

    def _pass(
        self,
        term: Term,
        what: str,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        displaced_weights: bool = False,
        **options: Any,
    ) -> WeightedSum:
        """Sum the results of a `gradient_pass` over a term's examples; the weight is λ over their number.

        The pass runs in the context ``around``, which may displace the weights; ``what`` names it.
        """
        name = term.phase(what)
        if (found := self._passes.finished(name)) is None:
            with around(), term.losses(displaced_weights) as losses:
                found = self._passes.run(name, term.examples, term.loader, losses=losses, **options)
        return mean_weight(term, found), found.sums

    def _total(self, parts: Sequence[WeightedSum]) -> LazyTensors:
        return weighted_total(parts, self._model.device)


def mean_weight(term: Term, found: GradientPass) -> float:
    """λ over the number of the examples that a pass over a term has counted; refused if it is none."""
    if not found.counted:
        raise UserError(
            f"No {term.phase('example')} has a finite loss and gradient at the scoring checkpoint; check the data "
            "and the weights."
        )
    return term.weight / found.counted


def weighted_total(parts: Sequence[WeightedSum], device: torch.device) -> LazyTensors:
    """Σ_t c_t G_t by parameter name, on the device where it is used; each tensor is made when it is asked for."""

    def make(name: str) -> Tensor:
        (first, sums), *others = parts
        total = sums[name].to(device) * first
        for weight, sums in others:
            total.add_(sums[name].to(device), alpha=weight)
        return total

    return LazyTensors(parts[0][1], make)
