"""The order in which the two sides are chosen, and what each round changed.

    both                     one score for each side, computed over everything: the paper's single shot
    parameters, data         the same scores, one side chosen and all of the other
    parameters_then_data     the weights are chosen, then the examples re-scored by these weights alone (u ⊙ m)
    data_then_parameters     the examples are chosen, then ḡ computed over these alone and the weights re-scored

The last two may take more rounds, in which each side is re-scored with the latest choice of the other.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from dualsft.matrix.pass_result import Statistic
from dualsft.selection.budgets import Budgets
from dualsft.selection.checks import Order
from dualsft.selection.diagnostics import Alignment, Stability
from dualsft.selection.scoring import ExampleScores


@runtime_checkable
class ScoresBothSides(Protocol):
    """What scores weights and examples: at one scoring checkpoint, or along a path.

    Attributes:
        measured: Name of a statistic -> example id -> its value.
        nonfinite: Ids of the pool examples whose loss or gradient was found not to be finite.
        identity: Name of a validation set -> both sides of the sum identity, as last checked.
    """

    measured: dict[str, Statistic]
    nonfinite: set[int]
    identity: dict[str, dict[str, float]]

    def both(self) -> tuple[Mapping[str, Tensor], ExampleScores]:
        """Score all weights over all examples, and all examples by all weights; see `weights`."""

    def weights(self, ids: Collection[int], occasion: str = "") -> Mapping[str, Tensor]:
        """Score all weights over these examples: parameter name -> φ_j, float32, on the host, made when it is read.

        ``occasion`` distinguishes the passes of this step from earlier ones, in their names.
        """

    def examples(self, mask: Mapping[str, Tensor] | None = None, occasion: str = "") -> ExampleScores:
        """Score every finite example of the pool, by the weights chosen in a mask or by all."""

    def prediction(self) -> dict[str, Any] | None:
        """Describe what the scores predict of a step, for the manifest, if anything."""

    def alignment(self) -> dict[str, Alignment]:
        """Validation set -> cosines of its directions; empty where no pass at one checkpoint gave them."""

    def stability(self) -> Stability | None:
        """How far two halves of the validation set agree on the scores, if they were asked."""

    def describe(self) -> dict[str, Any] | None:
        """Describe the path, for the manifest, if there is one."""


@dataclass
class Chosen:
    """Both sides: their latest scores, and the choices by them.

    Attributes:
        parameter_scores: The folder of the φ_j; None where no weight has a score.
        mask: Parameter name -> bool, of the parameter's full shape.
        example_scores: φ_i.
        examples: Ids of the chosen examples.
        duplicate_of: Each near-duplicate that could not be chosen -> the example that stands in its place.
        rounds: The choices of each round, and the share of the last round's choices that it kept.
    """

    parameter_scores: Path | None = None
    mask: Mapping[str, Tensor] = field(default_factory=dict)
    example_scores: ExampleScores = field(default_factory=ExampleScores)
    examples: set[int] = field(default_factory=set)
    duplicate_of: dict[int, int] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)


Write = Callable[[Mapping[str, Tensor]], Path | None]
"""Writes the φ_j into the files of the run, in the place of earlier ones."""


def choose_by_turns(
    order: Order, rounds: int, scoring: ScoresBothSides, budgets: Budgets, pool: list[int], write: Write
) -> Chosen:
    """Score and choose one side after the other, for ``rounds`` rounds."""
    chosen = Chosen()
    for number in range(1, rounds + 1):
        occasion = f", round {number}" if number > 1 else ""
        record: dict[str, Any] = {"round": number}
        for side in ("parameters", "data") if order == "parameters_then_data" else ("data", "parameters"):
            if side == "parameters":
                record[side] = _choose_parameters(scoring, budgets, chosen, pool, write, occasion)
            else:
                record[side] = _choose_examples(scoring, budgets, chosen, occasion)
        chosen.rounds.append(record)
    return chosen


def _choose_parameters(
    scoring: ScoresBothSides, budgets: Budgets, chosen: Chosen, pool: list[int], write: Write, occasion: str
) -> dict[str, Any]:
    """Score all weights over the chosen examples, and choose among them."""
    scores = scoring.weights(chosen.examples or pool, occasion)
    while late := chosen.examples & scoring.nonfinite:  # a gradient may not be finite although its row is
        chosen.example_scores = chosen.example_scores.without(late)
        chosen.examples, chosen.duplicate_of = budgets.examples(chosen.example_scores.scores, scoring.measured)
        occasion = f"{occasion}, again"
        scores = scoring.weights(chosen.examples, occasion)
    chosen.parameter_scores = write(scores)
    before, chosen.mask = chosen.mask, budgets.mask(chosen.parameter_scores)
    count = sum(int(m.count_nonzero()) for m in chosen.mask.values())
    kept = sum(int((m & before[name]).count_nonzero()) for name, m in chosen.mask.items()) if before else None
    return _record(count, kept)


def _choose_examples(scoring: ScoresBothSides, budgets: Budgets, chosen: Chosen, occasion: str) -> dict[str, Any]:
    """Score all examples by the chosen weights, and choose among them."""
    chosen.example_scores = scoring.examples(chosen.mask or None, occasion)
    before = chosen.examples
    chosen.examples, chosen.duplicate_of = budgets.examples(chosen.example_scores.scores, scoring.measured)
    return _record(len(chosen.examples), len(chosen.examples & before) if before else None)


def _record(count: int, kept: int | None) -> dict[str, Any]:
    """How many were chosen, and which share of them the round before had chosen too; None in the first round."""
    return {"selected": count, "overlap": None if kept is None else kept / count}
