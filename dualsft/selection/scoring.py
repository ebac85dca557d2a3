"""Both score vectors: of all weights over some examples, of all examples by some weights, or both in one pass.

    rows     φ_i = <u, g_i>            columns     φ_j = u_j Σ_i g_ij            Σ_i φ_i = Σ_j φ_j

A step uses the results of earlier ones: the weights' scores use Σ_i g_i over the chosen examples, the examples'
scores the direction u of the chosen weights. Whatever the order of the steps, the sum identity is checked as soon as
both of its sides are known, for the direction and the examples of the last two steps.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualsft.data.module import InstructionDataModule
from dualsft.errors import UserError
from dualsft.matrix.example_values import ExampleIds, ExampleValues, ids_without
from dualsft.matrix.pass_result import GradientPass, Statistic
from dualsft.matrix.passes import compute_dtype
from dualsft.matrix.spot_check import check_covered
from dualsft.models import PreTrainedModel
from dualsft.selection.alignment import cosine
from dualsft.selection.diagnostics import Alignment, Stability
from dualsft.selection.directions import (
    ColumnTotals,
    column_totals,
    combined_rows,
    combined_tokens,
    parameter_scores,
)
from dualsft.selection.held_direction import HeldDirection, masked
from dualsft.selection.normalization import Factors, inverses, scaled, scaled_tokens, token_counts
from dualsft.selection.passes import Passes
from dualsft.selection.paths.totals import column
from dualsft.selection.scorer_directions import DirectionRule
from dualsft.selection.settings import SelectionSettings
from dualsft.selection.stability import agreement
from dualsft.sharding.collectives import sum_of_shards

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_PRECISION_TOLERANCE = 2e-2


@dataclass
class ExampleScores:
    """The examples' scores.

    Attributes:
        scores: Example id -> φ_i, the validation sets combined.
        by_set: Name of a validation set -> example id -> its φ_i.
        tokens: Example id -> the contributions of its tokens; empty unless asked for.
    """

    scores: ExampleValues = field(default_factory=ExampleValues)
    by_set: dict[str, ExampleValues] = field(default_factory=dict)
    tokens: dict[int, Tensor] = field(default_factory=dict)

    def without(self, ids: Collection[int]) -> "ExampleScores":
        """These scores without some of the examples."""
        return ExampleScores(
            self.scores.without(ids),
            {name: scores.without(ids) for name, scores in self.by_set.items()},
            {i: values for i, values in self.tokens.items() if i not in ids},
        )


@dataclass
class _Latest:
    """The results of the latest steps; directions and rows for each validation set."""

    directions: list[HeldDirection] = field(default_factory=list)  # u, from the latest pool gradient
    halves: list[HeldDirection] = field(default_factory=list)  # u by the first halves of all sets, then the second
    half_rows: list[ExampleValues] = field(default_factory=list)  # likewise
    row_directions: Sequence[HeldDirection] = ()  # u of the latest rows, masked to the chosen weights
    rows: list[ExampleValues] = field(default_factory=list)
    covered: set[str] = field(default_factory=set)  # the parameters that the rows cover
    sums: Mapping[str, Tensor] = field(default_factory=dict)  # Σ_i g_i
    summed: ExampleIds = field(default_factory=lambda: np.zeros(0, np.int64))  # the examples that it is over, ascending


class Scoring:
    """Scores weights and examples at one scoring checkpoint.

    Args:
        model: The model at the scoring checkpoint.
        settings: How several validation sets' scores become one, and what is kept beside the scores.
        rule: Gives the directions.
        passes: Runs the passes over the pool.
        data: The pool.
        unsaved: Whether one pass for both sides leaves its result in memory, for a caller that saves the scores.

    Attributes:
        measured: Name of a statistic -> example id -> its value.
        nonfinite: Ids of the pool examples whose loss or gradient was found not to be finite.
        identity: Name of a validation set -> both sides of the sum identity, as last checked.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: SelectionSettings,
        rule: DirectionRule,
        passes: Passes,
        data: InstructionDataModule,
        unsaved: bool = False,
    ) -> None:
        self._model, self._settings, self._rule, self._passes = model, settings, rule, passes
        self._pass_for_both = passes.run_unsaved if unsaved else passes.run
        self._data, self._pool = data, np.flatnonzero(data.train_examples.is_ok())
        self._latest = _Latest()
        self._num_examples = 0
        self.measured: dict[str, Statistic] = {}
        self.nonfinite: set[int] = set()
        self.identity: dict[str, dict[str, float]] = {}

    @property
    def _finite(self) -> ExampleIds:
        return ids_without(self._pool, self.nonfinite)

    def both(self) -> tuple[Mapping[str, Tensor], ExampleScores]:
        """Score all weights over all examples, and all examples by all weights: one pass, or two if u needs ḡ."""
        if self._rule.needs_pool_gradient:
            self._sum_gradients(self._finite)
            examples = self.examples()
        else:
            ids = self._finite
            self._make_directions(len(ids), None)
            us = self._latest.directions
            found = self._pass_for_both("scores", **self._rows_of([*us, *self._latest.halves], columns=True))
            examples = self._take_rows(found, us)
            self._take_sums(found, ids)
        return self._weight_scores(), examples

    def weights(self, ids: Collection[int], occasion: str = "") -> Mapping[str, Tensor]:
        """Score all weights over these examples: parameter name -> φ_j, float32, on the host, made when it is read.

        ``occasion`` distinguishes the passes of this step from earlier ones, in their names.
        """
        self._sum_gradients(ids_without(np.sort(np.fromiter(ids, np.int64, len(ids))), self.nonfinite), occasion)
        return self._weight_scores()

    def examples(self, mask: Mapping[str, Tensor] | None = None, occasion: str = "") -> ExampleScores:
        """Score every finite example of the pool, by the weights chosen in a mask or by all."""
        if not self._latest.directions:
            if self._rule.needs_pool_gradient:
                self._sum_gradients(self._finite, occasion)
            else:
                self._make_directions(len(self._finite), None, occasion)
        us = [*self._latest.directions, *self._latest.halves]
        if mask:
            us = [HeldDirection(masked(u.exact, mask, self._model), self._model) for u in us]
        found = self._passes.run(f"scores{occasion}", **self._rows_of(us, columns=False))
        examples = self._take_rows(found, us[: len(self._rule.sets)])
        self._check()
        return examples

    def columns(self) -> list[dict[str, Tensor]]:
        """φ_j of each validation set, by parameter name, on the host, from the latest direction and sum."""
        sums = self._latest.sums
        return [{name: column(u.exact[name], sums[name]) for name in u.exact} for u in self._latest.directions]

    def prediction(self) -> dict[str, Any] | None:
        """Describe what the directions predict of the last pool step, for the manifest, if anything."""
        return self._rule.prediction(self._latest.sums, self._num_examples)

    def alignment(self) -> dict[str, Alignment]:
        """Validation set -> how its directions lie to each other, with ḡ over the examples last summed."""
        priors, latest = self._rule.prior_cosines(), self._latest
        us = dict(zip(self._rule.sets, latest.directions, strict=True))
        return {name: Alignment(priors[name], cosine(u.exact, latest.sums)) for name, u in us.items()}

    def stability(self) -> Stability | None:
        """How far two halves of the validation set agree on the scores last computed, if they were asked."""
        latest, combination = self._latest, self._settings.combination
        if not latest.halves:
            return None
        return agreement(latest.half_rows, [u.exact for u in latest.halves], latest.sums, combination)

    def describe(self) -> None:
        """One scoring checkpoint has no path to tell of."""

    def _over(self, ids: ExampleIds) -> dict[str, Any]:
        """The options of a pass over these examples of the pool."""
        return {"examples": len(ids), "loader": partial(self._data.pool_loader, ids)}

    def _rows_of(self, us: Sequence[HeldDirection], columns: bool) -> dict[str, Any]:
        """The options of a pass for the rows of these directions; the first such pass also takes the measurements."""
        measurement = self._rule.measurement(() if self.measured else self._settings.statistics)
        options = {"columns": columns, "by_token": self._settings.token_scores, "measurement": measurement}
        return {**self._over(self._finite), "directions": [u.held for u in us], **options}

    def _sum_gradients(self, ids: ExampleIds, occasion: str = "") -> None:
        """Compute Σ_i g_i over these examples, and its directions, unless they are the latest ones already."""
        if self._latest.directions and np.array_equal(self._latest.summed, ids):
            return
        everything = np.array_equal(ids, self._finite)
        self._latest.directions, self._latest.halves = [], []
        name = f"{'pool' if everything else 'chosen examples'} gradient{occasion}"
        found = self._passes.run(name, **self._over(ids))
        if not found.counted:
            raise UserError("No example of data.train has a finite loss and gradient at the scoring checkpoint.")
        self._take_sums(found, ids)
        self._latest.row_directions, self._latest.rows = (), []  # checked against this sum, and not needed again
        self._make_directions(found.counted, found.sums, occasion if everything else f" of the chosen{occasion}")

    def _take_sums(self, found: GradientPass, ids: ExampleIds) -> None:
        self.nonfinite |= found.nonfinite
        self._latest.sums, self._latest.summed = found.sums, ids_without(ids, found.nonfinite)
        self._check()

    def _take_rows(self, found: GradientPass, us: Sequence[HeldDirection]) -> ExampleScores:
        self.measured = self.measured or found.measured
        self.nonfinite |= found.nonfinite
        rows, tokens = found.rows[: len(us)], found.tokens[: len(us)]
        self._latest.row_directions, self._latest.rows, self._latest.covered = us, rows, found.covered
        self._latest.half_rows = found.rows[len(us) :]
        if self._settings.normalize != "none":
            factors = self._factors(rows[0].ids)
            rows, tokens = [scaled(of, factors) for of in rows], [scaled_tokens(of, factors) for of in tokens]
            self._latest.half_rows = [scaled(of, factors) for of in self._latest.half_rows]
        combination = self._settings.combination
        return ExampleScores(
            combined_rows(rows, combination),
            dict(zip(self._rule.sets, rows, strict=True)),
            combined_tokens(tokens, rows, combination),
        )

    def _factors(self, ids: ExampleIds) -> Factors:
        if self._settings.normalize == "tokens":
            return token_counts(ids, self._data.train_examples.num_tokens)
        return inverses(ids, self.measured[self._settings.norm])

    def _make_directions(self, count: int, sums: Mapping[str, Tensor] | None, occasion: str = "") -> None:
        """Compute u of each validation set, with ḡ over ``count`` examples if it is known."""
        self._num_examples = count
        us = self._rule.directions(sums, count, occasion)
        self._latest.directions = [HeldDirection(u, self._model) for u in us]
        self._latest.halves = [HeldDirection(u, self._model) for u in self._rule.half_directions()]

    def _weight_scores(self) -> Mapping[str, Tensor]:
        return parameter_scores(
            [u.exact for u in self._latest.directions], self._latest.sums, self._settings.combination
        )

    def _check(self) -> None:
        """Check Σ_i <u, g_i> = <u, Σ_i g_i> for the latest direction and the latest sum, once both are known.

        Check too that the rows cover every parameter with a gradient.
        """
        latest = self._latest
        if not latest.rows or not latest.sums:
            return
        names = list(latest.row_directions[0].held)
        moves = sum_of_shards(torch.tensor([int(latest.sums[name].any()) for name in names])).tolist()
        check_covered(self._model, latest.covered, [name for name, any_ in zip(names, moves, strict=True) if any_])
        for name, rows, u in zip(self._rule.sets, latest.rows, latest.row_directions, strict=True):
            summed = rows.where(np.isin(rows.ids, latest.summed))
            self.identity[name] = sum_identity(summed, column_totals(u.exact, latest.sums), compute_dtype(self._model))


def sum_identity(rows: Mapping[int, float], columns: ColumnTotals, dtype: torch.dtype) -> dict[str, float]:
    """Compute both sides of Σ_i φ_i = Σ_j φ_j, the predicted improvement, and how far apart they are.

    The difference is relative to Σ_j |φ_j|, the size of the numbers that were added.

    Args:
        rows: Example id -> φ_i.
        columns: The sums of the φ_j.
        dtype: The type of the activations, which decides how close the sums must be.

    Raises:
        UserError: if they differ by more than rounding: then the scores are wrong, and nothing may be built on them.
    """
    row_sum, column_sum = math.fsum(rows.values()), columns.total
    difference = abs(row_sum - column_sum) / columns.size if columns.size else 0.0
    tolerance = _TOLERANCE.get(dtype, _HALF_PRECISION_TOLERANCE)
    if not difference <= tolerance:
        raise UserError(
            f"The example scores add up to {row_sum:.6g} and the parameter scores to {column_sum:.6g}, which must be "
            f"the same number (difference {difference:.2g} of the scores' size, {tolerance:g} allowed for {dtype}); "
            "the model uses a weight in a way that cannot be seen from its module, or the gradients overflow: please "
            "report it."
        )
    return {"row_sum": row_sum, "column_sum": column_sum, "relative_difference": difference, "tolerance": tolerance}
