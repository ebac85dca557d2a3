"""The step size η, and the prediction of the quadratic model of V along the pool step d = P ⊙ ḡ.

    V(θ) − V(θ − η d)  ≈  η <v, d> − ½ η² dᵀHd

is largest at η = <v, d> / dᵀHd, if the curvature dᵀHd is positive: the ``auto`` step size. H is the one that the
scorer uses. The quadratic is from arXiv 2605.06166; choosing η by its minimum is this package's addition.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import torch

from dualsft.errors import UserError
from dualsft.needs import ask
from dualsft.runs.folder import RunFolder
from dualsft.scorers import Scorer, SecondOrderScorer
from dualsft.selection.directions import Statistics, check_vector, trainable_parameters

StepSize = float | Literal["auto"]
BOUND = "step-size"
"""The name of the state that says on which step size the run's scores depend."""
NEGLIGIBLE = 1e-3
"""Share of the first-order term below which the second-order one is said to change next to nothing."""


class Along(NamedTuple):
    """V along the pool step, for one validation set.

    Attributes:
        slope: <v, d>.
        curvature: dᵀHd with the scorer's H; None for a scorer without one.
        ratio: ‖P ⊙ Hd‖ / ‖P ⊙ v‖, if there is either; times η/2 it is u's second-order term against the first.
    """

    slope: float
    curvature: float | None
    ratio: float | None

    def gain(self, step_size: float) -> float:
        """The predicted improvement of V by a step of this size with all weights on all of the pool."""
        return step_size * self.slope - step_size**2 / 2 * (self.curvature or 0.0)


@torch.no_grad()
def along_pool_step(scorer: Scorer, statistics: Statistics) -> Along:
    """Measure V along the pool step; the pool's gradient must be known."""
    slope, curvature, first, second = [], [], [], []
    for name in trainable_parameters(statistics.model):
        with statistics.of_parameter(name, math.nan) as known:  # the curvature must not depend on η
            assert known.pool_gradient is not None
            p, v = known.preconditioner, known.validation_gradient
            step = (p * known.pool_gradient).double()
            slope.append(float((step * v).sum()))
            first.append(float((p * v).double().square().sum()))
            if isinstance(scorer, SecondOrderScorer):
                bend = ask(scorer, "curvature", known)
                check_vector(scorer, "curvature", bend, name, known.weight)
                curvature.append(float((step * bend).sum()))
                second.append(float((p * bend).double().square().sum()))
    if not curvature:
        return Along(math.fsum(slope), None, None)
    length = math.sqrt(math.fsum(first))
    ratio = math.sqrt(math.fsum(second)) / length if length else None
    return Along(math.fsum(slope), math.fsum(curvature), ratio)


def settle(setting: StepSize, along: Collection[Along], bound: bool = False) -> float:
    """Return η: the number given, or the one that minimises the mean of the validation sets' quadratics.

    ``bound`` says whether earlier scores of the run depend on the setting.

    Raises:
        UserError: if the quadratic has no minimum ahead: the pool step goes uphill, or the curvature is not positive.
    """
    if setting != "auto":
        return setting
    slope, curvature, _ = _mean(along)
    assert curvature is not None  # auto is for second-order scorers
    how = "start anew (--overwrite) with" if bound else "go on with --resume and"
    instead = f"{how} a number for model.step_size, such as the fine-tune's learning rate, or take another scorer"
    if not curvature > 0:
        raise UserError(
            f"model.step_size is auto, but the curvature along the pool step is {curvature:.3g}, not positive, so the "
            f"predicted improvement has no maximum; {instead}."
        )
    if not slope > 0:
        raise UserError(
            f"model.step_size is auto, but the pool step does not lower the validation objective (<v, d> is "
            f"{slope:.3g}, not positive), so the best step is none; {instead}."
        )
    return slope / curvature


def is_bound(run: RunFolder) -> bool:
    """Whether the run's scores depend on a step size already."""
    return run.load(BOUND) is not None


def bind(run: RunFolder, setting: StepSize) -> None:
    """Record that the run's scores depend on this step size from here on; refuse it if they depend on another."""
    kept = run.load(BOUND)
    if kept is None:
        run.save(BOUND, {}, {"step_size": setting})
    elif kept[1]["step_size"] != setting:
        raise UserError(
            f"{run.path} holds scores made with model.step_size {kept[1]['step_size']}, not {setting}; "
            "resume it with that, or give --overwrite."
        )


def describe(step_size: float, along: Mapping[str, Along], named: bool) -> dict[str, Any]:
    """The manifest's entry on the step and the predicted improvement, for each validation set too if named."""
    sets = {name: _describe(step_size, of) for name, of in along.items()}
    mean = _describe(step_size, _mean(along.values()))
    return {"step_size": step_size, **mean, **({"sets": sets} if named else {})}


def _describe(step_size: float, along: Along) -> dict[str, Any]:
    return {
        "slope": along.slope,
        "curvature": along.curvature,
        "predicted_improvement": along.gain(step_size),
        "second_order_share": None if along.ratio is None else step_size / 2 * along.ratio,
    }


def _mean(along: Collection[Along]) -> Along:
    """The mean of each figure over the validation sets; None where a set has none."""
    columns = zip(*along, strict=True)
    slope, *others = (None if None in column else math.fsum(column) / len(along) for column in columns)
    assert slope is not None
    return Along(slope, *others)


def warning(description: Mapping[str, Any]) -> str | None:
    """A warning about a second-order term too small to matter or too large to be believed; None otherwise."""
    share, size = description["second_order_share"], description["step_size"]
    if share is not None and share > 1:
        return (
            f"the second-order term is {share:.2g} times the first at a step size of {size:g}, more than a quadratic "
            "can be trusted for; lower model.step_size or, with the adam preconditioner, warm up on more examples."
        )
    if share is None or share >= NEGLIGIBLE:
        return None
    return (
        f"the second-order term is {share:.1g} of the first at a step size of {size:g}, too small to change the "
        "choice; model.step_size auto takes the step at which it counts."
    )
