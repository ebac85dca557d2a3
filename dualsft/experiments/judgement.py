"""What an audit's runs say: how far predicted gains can be trusted, for each side, scorer and setting of the fit."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dualsft.experiments.audit_plan import Side
from dualsft.experiments.statistics import Estimate, calibration, difference, mean_interval, runs_for_width, spearman
from dualsft.experiments.verdict import WIDTH, verdict


@dataclass(frozen=True)
class AuditRun:
    """One variant, trained with one setting of the fit, and what one scorer predicts for it.

    Attributes:
        side: What of it differs from the selection.
        family: How it was drawn: chosen, random, band, blocks, mixture or pair.
        label: Which of its family it is.
        scorer: Whose prediction it is.
        steps: Optimizer steps of the fit.
        learning_rate: Of the optimizer, at the start.
        predicted: The predicted gain, in nats where the scores are gains.
        gains: Seed -> by how much the validation objective's loss fell, in nats. What is compared with random variants
            may have more seeds than they have.
        held_out: Seed -> the same of the held-out set; empty if there is none.
    """

    side: Side
    family: str
    label: str
    scorer: str
    steps: int
    learning_rate: float
    predicted: float
    gains: Mapping[int, float]
    held_out: Mapping[int, float]


def judge(runs: Sequence[AuditRun], calibrated: bool) -> dict[str, Any]:
    """The figures of `audit.json`: side -> scorer -> figures, those of the first setting on top.

    Args:
        runs: All runs that did not fail.
        calibrated: Whether predictions are in nats, so that their size means something.
    """
    found: dict[str, Any] = {}
    for side, scorer in dict.fromkeys((run.side, run.scorer) for run in runs):
        own = [run for run in runs if (run.side, run.scorer) == (side, scorer)]
        settings = dict.fromkeys((run.steps, run.learning_rate) for run in own)
        judged = [_at_setting(side, [r for r in own if (r.steps, r.learning_rate) == s], calibrated) for s in settings]
        found.setdefault(side, {})[scorer] = {**judged[0], "settings": judged if len(judged) > 1 else []}
    return found


def _at_setting(side: Side, runs: Sequence[AuditRun], calibrated: bool) -> dict[str, Any]:
    """The figures of one side, scorer and setting."""
    on_validation = _against(side, runs, [run.gains for run in runs], calibrated)
    held_out = [run.held_out for run in runs]
    return {
        "steps": runs[0].steps,
        "learning_rate": runs[0].learning_rate,
        **on_validation,
        "held_out": _against(side, runs, held_out, calibrated) if all(held_out) else None,
    }


def _against(
    side: Side, runs: Sequence[AuditRun], gains: Sequence[Mapping[int, float]], calibrated: bool
) -> dict[str, Any]:
    """Predictions against one kind of measured gain."""
    predicted = np.array([run.predicted for run in runs])
    seeds = _usual_seeds(gains)
    by_seed = [np.array([of[seed] for seed in of if seed in seeds] or list(of.values())) for of in gains]
    measured = np.array([[of.mean()] for of in by_seed])
    order = spearman(predicted, measured)
    sizes = calibration(predicted, measured) if calibrated else None
    at_random = [k for k, run in enumerate(runs) if run.family in ("random", "blocks")]
    of_random = np.concatenate([np.array([]), *(by_seed[k] for k in at_random)])
    # of bands the last one's: the lowest
    by_family = {run.family: np.array(list(of.values())) for run, of in zip(runs, gains, strict=True)}
    chosen, lowest = (by_family.get(family, np.array([])) for family in ("chosen", "band"))
    over_random, over_lowest = difference(chosen, of_random), difference(chosen, lowest)
    factor = sizes.factor if sizes else None
    return {
        **_told("spearman", order),
        **_told("slope", sizes.slope if sizes else None),
        **_told("intercept", sizes.intercept if sizes else None),
        **_told("calibration_error", sizes.error if sizes else None),
        **_told("factor", factor),
        **_told("spearman_of_random", spearman(predicted[at_random], measured[at_random]) if at_random else None),
        **_told("chosen_over_random", over_random),
        **_told("chosen_over_lowest", over_lowest),
        "bands": _bands(runs, by_seed),
        "runs": len(runs),
        "seeds": len(seeds),
        "runs_needed": {"width": WIDTH, "runs": runs_for_width(order.value, WIDTH)} if order else None,
        "verdict": verdict(
            side,
            variants=len(runs),
            steps=runs[0].steps,
            spearman=order,
            factor=factor,
            slope=sizes.slope if sizes else None,
            over_random=over_random,
            over_lowest=over_lowest,
        ),
    }


def _usual_seeds(gains: Sequence[Mapping[int, float]]) -> set[int]:
    """The seeds that most variants were trained with: some have more, and a failed run leaves its variant fewer."""
    counts = Counter(seed for of in gains for seed in of)
    return {seed for seed, count in counts.items() if 2 * count > len(gains)} or set(counts)


def _told(name: str, estimate: Estimate | None) -> dict[str, Any]:
    """An estimate and its 95% interval under two keys; null where there is none."""
    return {
        name: estimate.value if estimate else None,
        f"{name}_interval": [estimate.low, estimate.high] if estimate else None,
    }


def _bands(runs: Sequence[AuditRun], gains: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """The curve over the bands of the ranking: the mean gain of each, with an interval if there are several seeds."""
    curve = []
    for k, run in enumerate(runs):
        if run.family == "band":
            interval = mean_interval(gains[k])
            curve.append(
                {
                    "band": run.label,
                    "predicted": run.predicted,
                    "gain": float(gains[k].mean()),
                    "gain_interval": [interval.low, interval.high] if interval else None,
                }
            )
    return curve


def as_rows(runs: Sequence[AuditRun]) -> list[dict[str, Any]]:
    """One row of ``runs.parquet`` for each run and seed."""
    plain = ("side", "family", "label", "scorer", "steps", "learning_rate", "predicted")
    return [
        {
            **{name: asdict(run)[name] for name in plain},
            "seed": seed,
            "gain": gain,
            "held_out_gain": run.held_out.get(seed),
        }
        for run in runs
        for seed, gain in run.gains.items()
    ]
