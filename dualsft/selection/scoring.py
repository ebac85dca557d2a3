"""Both score vectors, step by step: of the weights over some examples, of the examples by some weights, or of both.

A step takes from the last ones what it needs: the weights' scores the sum of gradients over the examples that were
chosen, the examples' scores the direction, of the weights that were chosen. Whatever the order of the steps, the sum
identity is checked as soon as both of its sides are known, for the direction and the examples of the last two steps.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dualsft.matrix.interaction import check_covered
from dualsft.matrix.pass_result import GradientPass
from dualsft.matrix.passes import compute_dtype
from dualsft.matrix.sketches import Measurement
from dualsft.runs.progress import say
from dualsft.scorers import Scorer
from dualsft.selection.directions import column_totals, directions, masked, parameter_scores
from dualsft.selection.identity import sum_identity
from dualsft.selection.objective import ValidationObjective
from dualsft.selection.phases import Phases
from dualsft.selection.statistics import Statistics
from dualsft.selection.step import Along, StepSize, along_pool_step, describe, settle, warning
from dualsft.selection.validation_sets import Combination, combined_rows, combined_tokens
from dualsft.sharding.collectives import all_reduce_sum

T = TypeVar("T")


@dataclass
class ExampleScores:
    """The examples' side.

    Attributes:
        scores: Example id -> φ_i, the validation sets combined.
        by_set: Name of a validation set -> example id -> its φ_i.
        tokens: Example id -> the contributions of its tokens; empty unless asked for.
    """

    scores: dict[int, float]
    by_set: dict[str, dict[int, float]]
    tokens: dict[int, Tensor]

    def without(self, ids: Collection[int]) -> "ExampleScores":
        """The same without some of the examples."""
        return ExampleScores(
            _without(self.scores, ids),
            {name: _without(scores, ids) for name, scores in self.by_set.items()},
            _without(self.tokens, ids),
        )


def _without(values: Mapping[int, T], ids: Collection[int]) -> dict[int, T]:
    return {i: value for i, value in values.items() if i not in ids}


@dataclass
class _Known:
    """What the steps so far have left.

    Attributes:
        directions: u of each validation set, at the pool gradient that it was made for.
        used: The directions of the last rows: the same, of the chosen weights alone.
        rows: The last rows, of each validation set.
        covered: The parameters that they cover.
        sums: The last Σ_i g_i, by parameter name.
        summed: The examples that it is over.
    """

    directions: list[dict[str, Tensor]] = field(default_factory=list)
    used: Sequence[Mapping[str, Tensor]] = ()
    rows: list[dict[int, float]] = field(default_factory=list)
    covered: set[str] = field(default_factory=set)
    sums: dict[str, Tensor] = field(default_factory=dict)
    summed: frozenset[int] = frozenset()


class Scoring:
    """Scores weights and examples at one scoring checkpoint.

    Args:
        model: The model at the scoring checkpoint.
        scorer: The rule for u.
        objective: V of each validation set.
        phases: Runs the passes.
        pool: Ids of the examples to score.
        step_size: η, or auto.
        combination: How several validation sets' scores become one.
        by_token: Whether to keep contributions by token.
        needs: What to measure of each example beside, in the first pass that takes their scores.

    Attributes:
        measured: What was measured, by name of the statistic and example id.
        nonfinite: Ids of the pool examples whose loss or gradient was found not to be finite.
        identity: Name of a validation set -> both sides of the sum identity, as last checked.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        scorer: Scorer,
        objective: ValidationObjective,
        phases: Phases,
        pool: list[int],
        step_size: StepSize,
        combination: Combination,
        by_token: bool,
        needs: Collection[str] = (),
    ) -> None:
        self._model, self._scorer, self._objective, self._phases = model, scorer, objective, phases
        self._pool, self._setting, self._combination, self._by_token = pool, step_size, combination, by_token
        self._needs = needs
        self.measured: dict[str, dict[int, Tensor]] = {}
        self._known = _Known()
        self._step: float | None = None if step_size == "auto" else step_size
        self._count = 0
        self._along: dict[str, Along] = {}
        self.nonfinite: set[int] = set()
        self.identity: dict[str, dict[str, float]] = {}

    @property
    def _finite(self) -> list[int]:
        return [i for i in self._pool if i not in self.nonfinite]

    def both(self) -> tuple[dict[str, Tensor], ExampleScores]:
        """The scores of all weights over all examples and of all examples by all weights: one pass, or two."""
        if self._waits:
            self._sum_gradients(self._finite)
            examples = self.examples()
        else:
            self._make_directions(len(self._finite), None, "")
            examples = self._take_rows(self._known.directions, "scores", columns=True)
        return self._weight_scores(), examples

    def weights(self, ids: Collection[int], occasion: str = "") -> dict[str, Tensor]:
        """Parameter name -> φ_j over these examples, float32, on the host.

        Args:
            ids: The examples.
            occasion: What sets the passes of this step apart from those of earlier ones, for their names.
        """
        self._sum_gradients(sorted(set(ids) - self.nonfinite), occasion)
        return self._weight_scores()

    def examples(self, mask: Mapping[str, Tensor] | None = None, occasion: str = "") -> ExampleScores:
        """φ_i of every finite example of the pool, by the chosen weights or by all.

        Args:
            mask: Parameter name -> which weights are chosen; None for all.
            occasion: What sets the pass of this step apart from those of earlier ones, for its name.
        """
        if not self._known.directions:
            if self._waits:
                self._sum_gradients(self._finite, occasion)
            else:
                self._make_directions(len(self._finite), None, occasion)
        like = dict(self._model.named_parameters())
        us = [masked(u, mask, like) for u in self._known.directions] if mask else self._known.directions
        return self._take_rows(us, f"scores{occasion}", columns=False)

    def prediction(self, named: bool) -> dict[str, object]:
        """What the quadratic predicts along the last pool step, for the manifest."""
        assert self._step is not None
        if not self._along:
            self._measure(self._objective.statistics(self._known.sums, self._count))
        description = describe(self._step, self._along, named)
        if message := warning(description):
            say(message)
        return description

    @property
    def _waits(self) -> bool:
        """Whether u can be made only once the pool's gradient is known."""
        return self._objective.needs_pool_gradient

    def _sum_gradients(self, ids: list[int], occasion: str = "") -> None:
        """Σ_i g_i over these examples, and the directions that go with it, unless they are those of the last time."""
        if self._known.directions and self._known.summed == frozenset(ids):
            return
        everything = ids == self._finite
        self._known.directions = []
        found = self._phases.pool_gradient(ids, f"{'pool' if everything else 'chosen examples'} gradient{occasion}")
        self._take_sums(found, ids)
        self._known.used, self._known.rows = (), []  # checked against this sum, and of no more use
        self._make_directions(found.counted, found.sums, occasion if everything else f" of the chosen{occasion}")

    def _take_sums(self, found: GradientPass, ids: Collection[int]) -> None:
        self.nonfinite |= found.nonfinite
        self._known.sums, self._known.summed = found.sums, frozenset(ids) - found.nonfinite
        self._check()

    def _take_rows(self, us: Sequence[Mapping[str, Tensor]], name: str, *, columns: bool) -> ExampleScores:
        ids = self._finite
        measurement = Measurement() if self.measured else self._objective.measurement(self._needs)
        found = self._phases.scores(us, ids, name, columns=columns, by_token=self._by_token, measurement=measurement)
        self.measured = self.measured or found.measured
        self._known.used, self._known.rows, self._known.covered = us, found.rows, found.covered
        if columns:
            self._take_sums(found, ids)
        else:
            self.nonfinite |= found.nonfinite
            self._check()
        rows = dict(zip(self._objective.sets, found.rows, strict=True))
        return ExampleScores(
            combined_rows(found.rows, self._combination),
            rows,
            combined_tokens(found.tokens, found.rows, self._combination),
        )

    def _make_directions(self, count: int, sums: Mapping[str, Tensor] | None, occasion: str) -> None:
        """U of each validation set, with ḡ over so many examples if it is known."""
        self._count = count
        statistics = self._objective.statistics(sums, count, occasion)
        if sums is not None:
            self._measure(statistics)
        self._step = settle(self._setting, list(self._along.values()), self._phases.bound)
        self._phases.bind(self._setting)
        self._known.directions = [directions(self._scorer, of, self._step) for of in statistics.values()]

    def _measure(self, statistics: Mapping[str, Statistics]) -> None:
        self._along = {name: along_pool_step(self._scorer, of) for name, of in statistics.items()}

    def _weight_scores(self) -> dict[str, Tensor]:
        return parameter_scores(self._known.directions, self._known.sums, self._combination)[0]

    def _check(self) -> None:
        """The sum identity, Σ_i <u, g_i> = <u, Σ_i g_i>, for the last direction and the last sum, once both are known.

        Raises:
            UserError: if it fails, or a parameter with a gradient is covered by no row.
        """
        known = self._known
        if not known.rows or not known.sums:
            return
        names = list(known.used[0])
        moves = all_reduce_sum(torch.tensor([int(known.sums[name].any()) for name in names])).tolist()
        check_covered(self._model, known.covered, [name for name, any_ in zip(names, moves, strict=True) if any_])
        for name, rows, u in zip(self._objective.sets, known.rows, known.used, strict=True):
            summed = {i: value for i, value in rows.items() if i in known.summed}
            self.identity[name] = sum_identity(summed, column_totals(u, known.sums), compute_dtype(self._model))
