"""The objective V_k(θ) of each validation set k, and what is known of it: its gradient, and its curvature as needed.

    V_k(θ) = mean_{i in validation set k} l_i(θ) + Σ_t λ_t mean_i L_t,i(θ)

with one and the same further terms t, such as the prior, for every set. λ of the validation loss is 1: a common factor
of all terms scales all scores alike. A further term is passed over once for all sets.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import get_args

from torch import Tensor
from transformers import PreTrainedModel

from dualsft.errors import UserError
from dualsft.matrix.sketches import Measurement
from dualsft.registry import check_needs_known
from dualsft.scorers import Scorer, SecondOrderScorer, Statistic
from dualsft.selection.phases import Part, Phases
from dualsft.selection.statistics import Preconditioner, Statistics
from dualsft.selection.sums import WeightedSums
from dualsft.selection.terms import Term

_HESSIAN = {"hessian_vector", "hessian_vector_difference"}


class ValidationObjective:
    """V of each validation set at one scoring checkpoint.

    Args:
        model: The model at the scoring checkpoint.
        scorer: Says what is needed.
        phases: Runs the passes.
        validation: Set name -> its term.
        further: The terms that all sets share.
        moments: ĉ by parameter name, where the preconditioner or the scorer takes it.
        adam: Whether the preconditioner is Adam's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        scorer: Scorer,
        phases: Phases,
        validation: Mapping[str, Term],
        further: Sequence[Term],
        moments: Mapping[str, Tensor],
        adam: bool,
    ) -> None:
        self._model, self._phases = model, phases
        self._needs, self._second_order = frozenset(scorer.needs), isinstance(scorer, SecondOrderScorer)
        self._validation, self._further = validation, further
        self._moments, self._adam = moments, adam
        self.preconditioner = Preconditioner(model, moments if adam else None)
        self._here: dict[str, Part] = {}
        self._gradients: dict[str, Mapping[str, Tensor]] = {}
        self._fishers: dict[str, Mapping[str, Tensor]] = {}

    @property
    def sets(self) -> list[str]:
        """The names of the validation sets."""
        return list(self._validation)

    @property
    def needs_pool_gradient(self) -> bool:
        """Whether the scorer's direction can be made only once ḡ is known."""
        return self._second_order or bool(self._needs & {"pool_gradient", *_HESSIAN})

    def measurement(self, names: Collection[str]) -> Measurement:
        """What to measure of single examples, by the preconditioner."""
        return Measurement(names, self.preconditioner if self._adam else None)

    def take_gradients(self) -> None:
        """Pass over every term for v, and over the validation sets once more for their empirical Fisher, if needed.

        Raises:
            UserError: if no example of a term has a finite loss and gradient, or memory runs out.
        """
        terms = [*self._validation.values(), *self._further]
        self._here = {term.phase("gradient"): self._phases.gradient(term) for term in terms}
        shared = [self._here[term.phase("gradient")] for term in self._further]
        self._gradients = {
            name: self._together([self._here[term.phase("gradient")], *shared])
            for name, term in self._validation.items()
        }
        if "empirical_fisher" in self._needs:
            squares = {name: self._phases.squared_gradient(term) for name, term in self._validation.items()}
            self._fishers = {name: self._together([part]) for name, part in squares.items()}

    def statistics(
        self, pool_sums: Mapping[str, Tensor] | None, num_examples: int, occasion: str = ""
    ) -> dict[str, Statistics]:
        """Set name -> what is known of it, with passes for products with the Hessian along P ⊙ ḡ if they are needed.

        Args:
            pool_sums: Σ_i g_i by parameter name; None if it is not known yet.
            num_examples: n, how many examples it is over, or will be.
            occasion: What sets the passes apart from earlier ones, for their names.

        Raises:
            UserError: if a product with the Hessian cannot be had.
        """
        pool = None if pool_sums is None else self._together([(1 / num_examples, pool_sums)])
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
        if not self._needs & _HESSIAN:
            return {}
        direction = {name: self._step(name, pool) for name in self.preconditioner}
        own = {name: self._product(term, direction, occasion) for name, term in self._validation.items()}
        shared = [part for term in self._further for part in self._product(term, direction, occasion)]
        return {name: self._together([*parts, *shared]) for name, parts in own.items()}

    def _product(self, term: Term, direction: Mapping[str, Tensor], occasion: str) -> list[Part]:
        if "hessian_vector" in self._needs:
            return [self._phases.hessian_vector(term, direction, occasion)]
        here = self._here[term.phase("gradient")]
        return list(self._phases.hessian_vector_difference(term, direction, here, occasion))

    def _step(self, name: str, pool: Mapping[str, Tensor]) -> Tensor:
        """P ⊙ ḡ of one parameter, in its own type, in which it is multiplied with the second derivative."""
        return (self.preconditioner[name] * pool[name]).to(self._model.get_parameter(name).dtype)

    def _together(self, parts: Sequence[Part]) -> Mapping[str, Tensor]:
        return WeightedSums(parts, self._model.device)


def needs_hessian(scorer: Scorer) -> bool:
    """Whether a scorer sees the Hessian itself, along the pool step."""
    return bool(_HESSIAN & set(scorer.needs))


def check_needs(scorer: Scorer, second_moment: bool) -> None:
    """Refuse a scorer whose statistics cannot be had, before any work.

    Args:
        scorer: The scorer.
        second_moment: Whether there is a warm-up, or a checkpoint that may hold its second moment.

    Raises:
        UserError: naming the scorer and the way out.
    """
    check_needs_known(scorer, scorer.needs, get_args(Statistic))
    if "second_moment" in scorer.needs and not second_moment:
        raise UserError(
            f"The scorer {type(scorer).__name__} needs the second moment of a warm-up, but model.warmup.fraction is 0; "
            "give model.warmup.fraction or model.warmup.checkpoint, or another source of curvature (diagonal_fisher: "
            "empirical_fisher)."
        )
