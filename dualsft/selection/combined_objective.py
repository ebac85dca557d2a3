"""P ⊙ v of a validation set at the scoring checkpoint, kept in the place of all that it is made of.

    w = P ⊙ v,   v = Σ_t c_t G_t        u = (η/n) w        <v, P ⊙ ḡ> = <w, ḡ>

with G_t the sum of a term's gradients and c_t = λ_t over the number of its examples. A first-order scorer uses P and v
in this product alone: with w in the place of v, and 1 in that of P, it gives the same direction. So the run's files
hold one sum for all terms, and once w is complete the second moment behind P is not needed any more.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from dualsft.matrix.sketches import Measurement
from dualsft.models import PreTrainedModel
from dualsft.models.lazy import under
from dualsft.objectives.prior import SelfDistillation
from dualsft.runs.folder import RunFolder
from dualsft.runs.progress import PhaseLog
from dualsft.scorers import FirstOrder
from dualsft.selection.alignment import cosine
from dualsft.selection.directions import Statistics, preconditioner
from dualsft.selection.known_objective import KnownObjective
from dualsft.selection.objective import mean_weight, weighted_total
from dualsft.selection.passes import Passes
from dualsft.selection.settings import SelectionSettings
from dualsft.selection.terms import Term
from dualsft.sharding.collectives import barrier

_PHASE = "validation-direction"


def can_combine(settings: SelectionSettings, validation_sets: int) -> bool:
    """Whether P ⊙ v is all that a run uses of both: one set without halves, and no statistics of examples under P."""
    alone = validation_sets == 1 and not settings.stability
    return isinstance(settings.scorer, FirstOrder) and alone and not (settings.preconditions and settings.statistics)


def is_combined(run: RunFolder) -> bool:
    """Whether an earlier run has kept P ⊙ v."""
    saved = run.load(_PHASE)
    return saved is not None and saved[1]["complete"]


class CombinedObjective(KnownObjective):
    """V of one validation set for a first-order scorer, see `can_combine`.

    Args:
        model: The model at the scoring checkpoint.
        passes: Runs the passes over the terms.
        run: Keeps their sum.
        log: Records what they cost.
        validation: The validation set -> its term.
        further: The other terms.
        moments: ĉ by parameter name, for P; None for P = 1. Read until w is complete.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        passes: Passes,
        run: RunFolder,
        log: PhaseLog,
        validation: Mapping[str, Term],
        further: Sequence[Term],
        moments: Mapping[str, Tensor] | None,
    ) -> None:
        self._model, self._passes, self._run, self._log = model, passes, run, log
        self._terms, self._moments = [*validation.values(), *further], moments
        self.sets, self.needs_pool_gradient = list(validation), False
        self._sum: Mapping[str, Tensor] = {}  # of the terms so far; P ⊙ v once all are added
        self._costs: list[dict[str, Any]] = []
        self._cosine: float | None = None

    def take_gradients(self) -> None:
        """Pass over every term that an earlier run has not added, one after the other."""
        added = self._resume()
        for term in self._terms[:added]:
            self._passes.drop_under_way(term.phase("gradient"))
        for number, term in enumerate(self._terms[added:], added + 1):
            known = len(self._log.phases)
            sums = self._add(term)
            self._costs += [asdict(phase) for phase in self._log.phases[known:]]
            if number == len(self._terms):
                self._precondition(sums)
            self._keep(sums, number)
            del sums  # the device, and the host's memory

    def _resume(self) -> int:
        """Go on from the sum that an earlier run kept; return how many terms it has."""
        if (saved := self._run.load(_PHASE)) is None:
            return 0
        tensors, notes = saved
        self._sum, self._costs, self._cosine = under("sum", tensors), notes["costs"], notes["cosine"]
        for cost in self._costs:
            self._log.restore(cost)
        added: int = notes["added"]
        return added

    def _keep(self, sums: Mapping[str, Tensor], added: int) -> None:
        """Save the sum of so many terms."""
        # 1. The sum without the latest term goes first, so that the disk never holds both: a kill here costs the passes
        #    over the terms, which are short beside those over the pool. A file that is open would stay on the disk.
        self._sum = {}
        barrier()  # another rank may have read it until now
        self._run.drop(_PHASE)
        # 2. The sum with it.
        complete = added == len(self._terms)
        notes = {"added": added, "complete": complete, "costs": self._costs, "cosine": self._cosine}
        self._run.save(_PHASE, {f"sum:{n}": s for n, s in sums.items()}, notes, replaces=self._passes.unsaved)
        self._passes.drop_unsaved()
        saved = self._run.load(_PHASE)
        assert saved is not None
        self._sum = under("sum", saved[0])

    def _add(self, term: Term) -> dict[str, Tensor]:
        """The sum of the terms so far and this one, each tensor in the place of the term's own."""
        with term.losses(False) as losses:
            found = self._passes.run_unsaved(term.phase("gradient"), term.examples, term.loader, losses=losses)
        weight, own = mean_weight(term, found), dict(found.sums)
        found.sums = {}
        if term.kind == SelfDistillation.name:  # the first after the validation loss
            self._cosine = cosine(self._sum, own)
        parts = [(1.0, self._sum), (weight, own)] if self._sum else [(weight, own)]
        total = weighted_total(parts, self._model.device)
        for name in own:
            own[name] = total[name].to(own[name].device)
        return own

    def _precondition(self, sums: dict[str, Tensor]) -> None:
        p = preconditioner(self._model, self._moments)
        for name, total in sums.items():
            total.mul_(p[name].to(total.device))
        self._moments = None  # and its file can go

    def measurement(self, names: Collection[str]) -> Measurement:
        """The statistics to measure of single examples; without the preconditioner, as none uses it here."""
        return Measurement(names, None)

    def prior_cosines(self) -> dict[str, float | None]:
        """The cosine of the validation loss's gradient with the prior's; None without a prior, or where zero."""
        return dict.fromkeys(self.sets, self._cosine)

    def half_gradients(self, name: str) -> list[Mapping[str, Tensor]]:
        """There are no halves."""
        return []

    def statistics(
        self, pool_sums: Mapping[str, Tensor] | None, num_examples: int, occasion: str = ""
    ) -> dict[str, Statistics]:
        """The set's statistics, with P ⊙ v in the place of v, and 1 in that of P."""
        device = self._model.device
        pool = None if pool_sums is None else weighted_total([(1 / num_examples, pool_sums)], device)
        direction = weighted_total([(1.0, self._sum)], device)
        (name,) = self.sets
        return {name: Statistics(self._model, direction, preconditioner(self._model, None), num_examples, pool)}
