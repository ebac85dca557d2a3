"""Scores along a path whose directions a rule defines, as the run's scorer does at each checkpoint of the warm-up.

    φ_i = Σ_k <u_k, g_i(θ_k)>        φ_j = Σ_k (u_k)_j Σ_i g_ij(θ_k)        with θ_k at the end of each piece

Each point is scored as a single scoring checkpoint is; the scores of all points are added up.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualsft.data.module import InstructionDataModule
from dualsft.matrix.example_values import ExampleIds, ExampleValues
from dualsft.matrix.pass_result import Statistic
from dualsft.matrix.sketches import NORM, PRECONDITIONED_NORM, Measurement
from dualsft.models import PreTrainedModel
from dualsft.models.dtypes import accumulator_dtype
from dualsft.models.lazy import LazyTensors
from dualsft.needs import ask
from dualsft.paths import Piece, PieceRows, ScoringPath
from dualsft.runs.folder import RunFolder
from dualsft.runs.progress import PhaseLog
from dualsft.selection.diagnostics import Alignment
from dualsft.selection.directions import Statistics, check_vector, combined, combined_rows, trainable_parameters
from dualsft.selection.normalization import scaled, scaled_tokens, token_counts
from dualsft.selection.objective import ValidationObjective
from dualsft.selection.passes import Passes
from dualsft.selection.paths.ending import EndedPath
from dualsft.selection.paths.scoring import contribution
from dualsft.selection.paths.totals import PathTotals
from dualsft.selection.paths.walk import RecordedPath
from dualsft.selection.scorer_directions import DirectionRule, ScorerDirections
from dualsft.selection.scoring import ExampleScores, Scoring
from dualsft.selection.settings import SelectionSettings
from dualsft.selection.terms import Term
from dualsft.sharding.collectives import sum_of_shards
from dualsft.sharding.shards import full_tensor, shard_copy


class PathDirections(DirectionRule):
    """The directions of a path's rule at the end of one piece.

    Args:
        model: The model there.
        rule: The path's rule.
        path: Its points.
        piece: Which piece it is.
        scorer: The run's scorer there.
        objective: V of each validation set there.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rule: ScoringPath,
        path: RecordedPath,
        piece: int,
        scorer: ScorerDirections,
        objective: ValidationObjective,
    ) -> None:
        self._model, self._rule, self._path, self._piece = model, rule, path, piece
        self._scorer, self._objective = scorer, objective
        self.sets = objective.sets
        self.needs_pool_gradient = "scorer_direction" in rule.needs and scorer.needs_pool_gradient

    def measurement(self, names: Collection[str]) -> Measurement:
        """The statistics to measure of single examples, those that the rule needs among them."""
        return self._objective.measurement({*names, *self._rule.needs_of_examples})

    def directions(self, sums: Mapping[str, Tensor] | None, count: int, occasion: str) -> list[LazyTensors]:
        """u of each set by the rule."""
        by_scorer: Sequence[Mapping[str, Tensor]] = [{} for _ in self.sets]
        if "scorer_direction" in self._rule.needs:
            by_scorer = self._scorer.directions(sums, count, occasion)
        if "statistics" not in self._rule.needs:
            return [self._of_set(u, None) for u in by_scorer]
        statistics = self._objective.statistics(None, count, occasion).values()
        return [self._of_set(u, of) for u, of in zip(by_scorer, statistics, strict=True)]

    def _of_set(self, by_scorer: Mapping[str, Tensor], statistics: Statistics | None) -> LazyTensors:
        before, after = self._path.weights(self._piece), self._path.weights(self._piece + 1)
        weights = trainable_parameters(self._model)

        def make(name: str) -> Tensor:
            weight = weights[name]
            with statistics.of_parameter(name, math.nan) if statistics else nullcontext() as known:
                piece = Piece(
                    name,
                    self._piece,
                    start=_full(before[name], weight),
                    end=_full(after[name], weight),
                    learning_rate=self._path.learning_rate,
                    scorer_direction=full_tensor(by_scorer[name], weight) if name in by_scorer else None,
                    statistics=known,
                )
                u = ask(self._rule, "direction", piece)
            check_vector(self._rule, "direction", u, name, weight)
            return shard_copy(u, weight)

        return LazyTensors(weights, make)

    def prediction(self, sums: Mapping[str, Tensor], count: int) -> dict[str, Any] | None:
        """The prediction of the run's scorer, if the rule uses it."""
        return self._scorer.prediction(sums, count) if "scorer_direction" in self._rule.needs else None

    def validation_norms(self) -> list[float]:
        """‖v‖ of each set."""
        norms = []
        for of in self._objective.statistics(None, 1).values():
            local = math.fsum(float(v.double().square().sum()) for v in of.validation_gradient.values())
            norms.append(math.sqrt(float(sum_of_shards(torch.tensor(local, dtype=torch.float64)))))
        return norms


def _full(shard: Tensor, weight: Tensor) -> Tensor:
    """A (local) tensor in the type of sums, on the weight's device and of its full shape."""
    return full_tensor(shard.to(weight.device, accumulator_dtype(weight)), weight)


class CheckpointScoring:
    """Scores weights and examples at the end of each piece of a path, and adds the scores up.

    Args:
        model: Any point of the path; it is moved.
        settings: The path's rule, the scorer, and how several validation sets' scores become one.
        data: The pool.
        passes: Runs the passes.
        run: Keeps the sums, and records on which step size they depend.
        log: Records the cost of sums that an earlier run kept.
        ended: The path.
        terms: The terms of V: of each validation set, and those that all sets share.

    Attributes:
        measured: Name of a statistic -> example id -> its value at the last point.
        nonfinite: Ids of the pool examples whose loss or gradient was found not to be finite.
        identity: Name of a validation set -> both sides of the sum identity, added up over the points.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: SelectionSettings,
        data: InstructionDataModule,
        passes: Passes,
        run: RunFolder,
        log: PhaseLog,
        ended: EndedPath,
        terms: tuple[Mapping[str, Term], Sequence[Term]],
    ) -> None:
        self._model, self._settings, self._data = model, settings, data
        self._passes, self._run, self._log, self._terms = passes, run, log, terms
        self._ended, self._path = ended, ended.path
        self._about: dict[str, Any] = {}
        self.measured: dict[str, Statistic] = {}
        self.nonfinite: set[int] = set()
        self.identity: dict[str, dict[str, float]] = {}

    def both(self) -> tuple[Mapping[str, Tensor], ExampleScores]:
        """Score all weights over all examples, and all examples by all weights."""

        def score(scoring: Scoring) -> _Found:
            return _Found(scoring.both()[1], scoring.columns())

        totals = self._over_points("scores", score)
        return self._weight_scores(totals), self._example_scores(totals)

    def weights(self, ids: Collection[int], occasion: str = "") -> Mapping[str, Tensor]:
        """Score all weights over these examples."""

        def score(scoring: Scoring) -> _Found:
            scoring.weights(ids, occasion)
            return _Found(None, scoring.columns())

        return self._weight_scores(self._over_points(f"weights{occasion}", score))

    def examples(self, mask: Mapping[str, Tensor] | None = None, occasion: str = "") -> ExampleScores:
        """Score every finite example of the pool, by the weights chosen in a mask or by all."""

        def score(scoring: Scoring) -> _Found:
            return _Found(scoring.examples(mask, occasion), [])

        return self._example_scores(self._over_points(f"examples{occasion}", score))

    def _over_points(self, name: str, score: Callable[[Scoring], "_Found"]) -> PathTotals:
        """Add up what the points give; start again without an example that is not finite at one of them."""
        key = f"path-{name}".replace(" ", "-").replace(",", "")
        totals = PathTotals.load(self._run, key, self._log) or PathTotals()
        self.nonfinite |= set(totals.about.get("nonfinite", ()))
        for piece in range(totals.points, self._path.pieces):
            known, phases = set(self.nonfinite), len(self._log.phases)
            rule, scoring = self._at(piece)
            found = score(scoring)
            self.nonfinite |= scoring.nonfinite
            if self.nonfinite != known:
                self._run.drop(key)
                return self._over_points(name, score)
            rows = self._rows(found.examples, scoring, rule) if found.examples else []
            tokens = [found.examples.tokens] if found.examples and found.examples.tokens else []
            costs = [asdict(phase) for phase in self._log.phases[phases:]]
            totals.add_sums(rows, tokens, found.columns, *costs)
            totals.measured = scoring.measured
            self._add_notes(totals, scoring, predicts=bool(found.columns) and piece == self._path.pieces - 1)
            totals.save(self._run, key)
            if "then" not in self._settings.order:  # else later rounds take the gradients of V again
                self._passes.forget_all()
        self._passes.place = ""
        self.measured = self.measured or totals.measured
        self.identity = totals.about["identity"] or self.identity
        self._about |= totals.about
        return totals

    def _at(self, piece: int) -> tuple[PathDirections, Scoring]:
        """The model at the end of a piece, scored as a single scoring checkpoint is."""
        settings, point = self._settings, piece + 1
        self._path.move(self._model, point)
        without = f", without {len(self.nonfinite)}" if self.nonfinite else ""
        self._passes.place = f" at point {point} of {self._path.pieces}{without}"
        moments = self._path.second_moment(point) if settings.needs_second_moment else {}
        objective = ValidationObjective(self._model, settings, self._passes, *self._terms, moments)
        if settings.path_rule.needs:
            objective.take_gradients()
        scorer = ScorerDirections(settings, objective, self._run, self._data.named_validation)
        rule = PathDirections(self._model, settings.path_rule, self._path, piece, scorer, objective)
        scoring = Scoring(self._model, settings, rule, self._passes, self._data)
        scoring.nonfinite |= self.nonfinite
        return rule, scoring

    def _rows(self, examples: ExampleScores, scoring: Scoring, rule: PathDirections) -> list[ExampleValues]:
        """What a piece adds to the examples' scores for each set, by the path's own rule."""
        path, num_tokens = self._settings.path_rule, self._data.train_examples.num_tokens
        if path.adds_rows:
            return list(examples.by_set.values())
        added = []
        norms = rule.validation_norms() if "statistics" in path.needs else [None] * len(examples.by_set)
        for rows, norm in zip(examples.by_set.values(), norms, strict=True):
            ids = np.sort(rows.ids)

            def measured(name: str, ids: ExampleIds = ids) -> Tensor | None:
                of = scoring.measured.get(name)
                return None if of is None else torch.from_numpy(ExampleValues.of(of).at(ids))

            piece = PieceRows(
                torch.tensor(ids),
                torch.from_numpy(rows.at(ids)),
                torch.tensor(num_tokens[ids], dtype=torch.int64),
                norm,
                measured(NORM),
                measured(PRECONDITIONED_NORM),
            )
            added.append(ExampleValues(ids, contribution(path, piece).numpy()))
        return added

    def _add_notes(self, totals: PathTotals, scoring: Scoring, predicts: bool) -> None:
        """Add the point's sum identities to those before, and note the prediction at the last point, over all sums."""
        before = totals.about.get("identity", {})
        totals.about["nonfinite"] = sorted(self.nonfinite)
        totals.about["identity"] = {name: _added(before.get(name), of) for name, of in scoring.identity.items()}
        if predicts:
            totals.about["prediction"] = scoring.prediction()

    def _weight_scores(self, totals: PathTotals) -> dict[str, Tensor]:
        sets, combination = totals.columns, self._settings.combination
        return {name: combined([of[name] for of in sets], combination).float() for name in sets[0]}

    def _example_scores(self, totals: PathTotals) -> ExampleScores:
        rows, tokens = totals.rows, totals.tokens[0] if totals.tokens else {}
        if self._settings.path.normalization == "length":
            factors = token_counts(rows[0].ids, self._data.train_examples.num_tokens)
            rows, tokens = [scaled(of, factors) for of in rows], scaled_tokens(tokens, factors)
        by_set = dict(zip(self._terms[0], rows, strict=True))
        return ExampleScores(combined_rows(rows, self._settings.combination), by_set, tokens)

    def prediction(self) -> dict[str, Any] | None:
        """Describe the quadratic's prediction at the last point, for the manifest; None if no scorer took part."""
        found: dict[str, Any] | None = self._about.get("prediction")
        return found

    def alignment(self) -> dict[str, Alignment]:
        """There is none: the directions change along the path."""
        return {}

    def stability(self) -> None:
        """Halves of the validation set are refused along a path."""

    def describe(self) -> dict[str, Any]:
        """The manifest's entry on the path of each validation set."""
        return dict.fromkeys(self._terms[0], self._ended.describe())


@dataclass(frozen=True)
class _Found:
    """What one point gives: the examples' scores, and each set's φ_j by parameter name."""

    examples: ExampleScores | None
    columns: list[dict[str, Tensor]]


def _added(before: Mapping[str, float] | None, more: Mapping[str, float]) -> dict[str, float]:
    """Both sides of the sum identity over two points or more; the difference is the largest."""
    if before is None:
        return dict(more)
    return {
        "row_sum": before["row_sum"] + more["row_sum"],
        "column_sum": before["column_sum"] + more["column_sum"],
        "relative_difference": max(before["relative_difference"], more["relative_difference"]),
        "tolerance": more["tolerance"],
    }
