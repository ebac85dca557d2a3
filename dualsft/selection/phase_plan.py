"""How many phases a selection has, known before the first of them."""

from dualsft.scorers import SecondOrderScorer
from dualsft.selection.settings import SelectionSettings
from dualsft.selection.terms import HESSIAN


def count_phases(settings: SelectionSettings, validation_sets: int) -> int | None:
    """The phases of a selection at one scoring checkpoint; None along a path, whose points decide.

    There may be one less, where a round chooses what the one before it chose, and more, where an example turns out not
    to be finite.
    """
    if settings.path.along is not None:
        return None
    needs = frozenset(settings.scorer.needs)
    weights = [settings.prior.weight, *(objective.weight for objective in settings.objectives)]
    terms = validation_sets + sum(map(bool, weights))
    halves = validation_sets if settings.stability else 0
    products = terms * (1 if "hessian_vector" in needs else 2) if needs & HESSIAN else 0
    warm_up = int(settings.warmup.checkpoint is None and settings.warmup.fraction > 0)
    fishers = validation_sets if "empirical_fisher" in needs else 0
    return warm_up + terms + halves + fishers + _of_both_sides(settings, products, needs)


def _of_both_sides(settings: SelectionSettings, products: int, needs: frozenset[str]) -> int:
    """The passes over the pool, with the products that each new gradient of it takes."""
    gradient = 1 + products
    pool_first = isinstance(settings.scorer, SecondOrderScorer) or bool(needs & {"pool_gradient", *HESSIAN})
    if "then" not in settings.order:
        return gradient + 1 if pool_first else 1
    first = gradient if pool_first and settings.order == "data_then_parameters" else 0
    return first + settings.rounds * (gradient + 1)
