"""Scores along complete paths, one along each validation set: u_k = θ_k − θ_{k+1}.

    rows       φ_i = l_i(θ_0) − l_i(θ_K)                how far the path lowers each example's loss
    columns    φ_j = Σ_k (u_k)_j mean_v g_vj(θ_k')      what moving a weight along it does for the validation set,
               φ_j = Σ_k (u_k)_j Σ_i g_ij(θ_k')         or for the pool

Where only rows are wanted from the pool, they come from passes without gradients at both ends. How long the path is,
the validation set decides: it ends where the part of the set that it is not trained on has the lowest loss.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualsft.data.module import InstructionDataModule
from dualsft.errors import UserError
from dualsft.matrix.example_values import ExampleIds, ExampleValues, ids_without
from dualsft.matrix.pass_result import Statistic
from dualsft.matrix.sketches import Measurement
from dualsft.models import PreTrainedModel
from dualsft.needs import ask
from dualsft.paths import PieceRows
from dualsft.selection.diagnostics import Alignment
from dualsft.selection.directions import combined, combined_rows, combined_tokens
from dualsft.selection.normalization import (
    Factors,
    inverses,
    scaled,
    scaled_tokens,
    smoothed_shares,
    token_counts,
)
from dualsft.selection.passes import Passes
from dualsft.selection.paths.completeness import Completeness
from dualsft.selection.paths.ending import EndedPath, validation_side
from dualsft.selection.paths.integral import Falls, Integral, PathIntegrator, Side
from dualsft.selection.scoring import ExampleScores
from dualsft.selection.settings import SelectionSettings


@dataclass
class _SetPath:
    """The path along one validation set.

    Attributes:
        ended: The path.
        set: The validation set.
        rows: The completeness over the pool, as last checked.
        columns: The completeness over the validation set, as last checked.
    """

    ended: EndedPath
    set: Side
    rows: Completeness | None = None
    columns: Completeness | None = None

    @property
    def integrator(self) -> PathIntegrator:
        """Integrates along it."""
        return self.ended.integrator


class PathScoring:
    """Scores weights and examples along a path to each validation set.

    Args:
        model: Any point of a path; it is moved.
        settings: The path, and how several validation sets' scores become one.
        data: The pool and the validation sets.
        passes: Runs the passes.
        paths: The path of each validation set.

    Attributes:
        measured: Name of a statistic -> example id -> its value at θ_0.
        nonfinite: Ids of the pool examples whose loss or gradient was found not to be finite.
        identity: Name of a validation set -> both sides of the sum identity; empty where no pass gave both.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: SelectionSettings,
        data: InstructionDataModule,
        passes: Passes,
        paths: Mapping[str, EndedPath],
    ) -> None:
        self._model, self._settings, self._data, self._passes = model, settings, data, passes
        self._pool = Side("pool", data.pool_loader, np.flatnonzero(data.train_examples.is_ok()))
        self._falls: dict[str, Falls] = {}
        self._whole: dict[str, Integral] = {}  # over the whole pool, by all weights
        self._columns: dict[str, dict[str, Tensor]] = {}
        self.measured: dict[str, Statistic] = {}
        self.nonfinite: set[int] = set()
        self.identity: dict[str, dict[str, float]] = {}
        self._paths = {
            name: _SetPath(of, validation_side(data, name, data.validation_sets[name].ok_ids()))
            for name, of in paths.items()
        }

    def both(self) -> tuple[Mapping[str, Tensor], ExampleScores]:
        """Score all weights and all examples."""
        examples = self.examples()
        return self.weights(self._pool.ids), examples

    def examples(self, mask: Mapping[str, Tensor] | None = None, occasion: str = "") -> ExampleScores:
        """Score every finite example of the pool, by the weights chosen in a mask or by all."""
        self._measure()
        rows: dict[str, ExampleValues] = {}
        tokens: dict[str, dict[int, Tensor]] = {}
        for name, of in self._paths.items():
            falls = self._fall(name)
            needs_gradients = mask is not None or self._settings.token_scores or self._pool_columns_are_due
            if not self._settings.path_rule.adds_rows:
                rows[name] = self._contributions(of)
            elif needs_gradients:
                found = self._over_pool(name, self._finite, mask, occasion)
                rows[name] = found.rows
                tokens[name] = found.tokens
            else:
                rows[name] = falls.fall
        finite = ids_without(reduce(np.intersect1d, (np.sort(of.ids) for of in rows.values())), self.nonfinite)
        if not len(finite):
            raise UserError("No example of data.train has a finite loss and gradient all along the path.")
        factors = {name: self._factors(name, finite) for name in rows}
        by_set = {name: scaled(ExampleValues(finite, of.at(finite)), factors[name]) for name, of in rows.items()}
        kept = {name: {i: of[i] for i in finite.tolist()} for name, of in tokens.items() if of}
        contributions = [scaled_tokens(of, factors[name]) for name, of in kept.items()]
        values, combination = list(by_set.values()), self._settings.combination
        return ExampleScores(
            combined_rows(values, combination), by_set, combined_tokens(contributions, values, combination)
        )

    def weights(self, ids: Collection[int], occasion: str = "") -> Mapping[str, Tensor]:
        """Score all weights: over the validation set, these examples of the pool, or by both; {} if all are taken."""
        if not self._settings.chooses_weights:
            return {}
        kind, chosen = self._settings.path.columns, np.intersect1d(self._finite, np.fromiter(ids, np.int64, len(ids)))
        found = []
        for name, of in self._paths.items():
            parts = []
            if kind in ("target", "product"):
                parts.append(self._over_set(name, of))
            if kind in ("pool", "product"):
                parts.append(self._over_pool(name, chosen, None, occasion).columns)
            found.append(parts)
        products = [{n: parts[0][n] * parts[1][n] for n in parts[0]} if len(parts) > 1 else parts[0] for parts in found]
        return {n: combined([of[n] for of in products], self._settings.combination).float() for n in products[0]}

    @property
    def _finite(self) -> ExampleIds:
        return ids_without(self._pool.ids, self.nonfinite)

    @property
    def _pool_columns_are_due(self) -> bool:
        return self._settings.chooses_weights and self._settings.path.columns != "target"

    def _fall(self, name: str) -> Falls:
        if name not in self._falls:
            self._falls[name] = found = self._paths[name].integrator.falls(self._pool)
            self.nonfinite |= found.nonfinite
        return self._falls[name]

    def _over_pool(self, name: str, ids: ExampleIds, mask: Mapping[str, Tensor] | None, occasion: str) -> Integral:
        """The integral over examples of the pool along a set's path."""
        of, fall = self._paths[name], self._fall(name).fall
        due = fall.where(np.isin(fall.ids, ids))
        if mask is None and name in self._whole and _same(due.ids, self._whole[name].rows.ids):
            return self._whole[name]
        whole = _same(due.ids, fall.without(self.nonfinite).ids)
        side = self._pool if whole else replace(self._pool, name="chosen")
        found, bad = of.integrator.over(side, due, self._pool_columns_are_due and mask is None, mask, occasion)
        self.nonfinite |= bad
        if found.identity is not None:
            self.identity[name] = found.identity
        if whole and mask is None:
            self._whole[name], of.rows = found, found.completeness
        return found

    def _over_set(self, name: str, of: _SetPath) -> dict[str, Tensor]:
        """φ_j over the mean loss of a validation set."""
        if name not in self._columns:
            fall = of.integrator.falls(of.set).fall
            found, bad = of.integrator.over(of.set, fall, columns=True)
            of.columns = found.completeness
            if not self._pool_columns_are_due and found.identity is not None:
                self.identity[name] = found.identity
            self._columns[name] = {n: total / (len(fall) - len(bad)) for n, total in found.columns.items()}
        return self._columns[name]

    def _contributions(self, of: _SetPath) -> ExampleValues:
        """What the pieces add to the examples' scores by the path's own rule, from the falls along each."""
        rule, num_tokens = self._settings.path_rule, self._data.train_examples.num_tokens
        losses = [of.integrator.losses(self._pool, point) for point in range(of.ended.path.pieces + 1)]
        self.nonfinite |= {i for _, bad in losses for i in bad}
        ids = self._finite
        total = torch.zeros(len(ids), dtype=torch.float64)
        for (before, _), (after, _) in pairwise(losses):
            falls = torch.from_numpy(before.at(ids) - after.at(ids))
            rows = PieceRows(torch.tensor(ids), falls, torch.tensor(num_tokens[ids], dtype=torch.int64))
            total += contribution(rule, rows)
        return ExampleValues(ids, total.numpy())

    def _factors(self, name: str, ids: ExampleIds) -> Factors:
        kind, num_tokens = self._settings.path.normalization, self._data.train_examples.num_tokens
        if kind == "smoothed_loss":
            return smoothed_shares(ids, self._fall(name).start, num_tokens)
        if kind == "initial_loss":
            return inverses(ids, self._fall(name).start)
        return token_counts(ids, num_tokens) if kind == "length" else ExampleValues(ids, np.ones(len(ids)))

    def _measure(self) -> None:
        """Measure the statistics that the data allocator needs, at θ_0."""
        needs = self._settings.data_allocator.needs
        if not needs or self.measured:
            return
        next(iter(self._paths.values())).ended.path.move(self._model, 0)
        loader, measurement = partial(self._data.pool_loader, self._pool.ids), Measurement(needs)
        found = self._passes.run("statistics", len(self._pool.ids), loader, columns=False, measurement=measurement)
        self.measured = found.measured
        self.nonfinite |= found.nonfinite

    def prediction(self) -> None:
        """There is none: the scores are no model of a step, but what the path does."""
        return None

    def alignment(self) -> dict[str, Alignment]:
        """There is none: the directions change along the path."""
        return {}

    def stability(self) -> None:
        """Halves of the validation set are refused along a path."""

    def describe(self) -> dict[str, Any]:
        """The manifest's entry on each path: its points, why it ends where it does, and how complete the scores are."""
        return {
            name: {
                **of.ended.describe(),
                "pool": of.rows and asdict(of.rows),
                "validation": of.columns and asdict(of.columns),
            }
            for name, of in self._paths.items()
        }


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether these are the same examples, in whatever order."""
    return np.array_equal(np.sort(one), np.sort(other))


def contribution(rule: Any, rows: PieceRows) -> Tensor:
    """What a piece adds to the examples' scores by a path's rule, float64; refused unless each is a finite number."""
    found = ask(rule, "contribution", rows)
    if not isinstance(found, Tensor) or found.shape != rows.score.shape or not bool(found.isfinite().all()):
        raise UserError(
            f"{type(rule).__name__}.contribution must give a finite number for each of {len(rows.score):,} examples; "
            "mend it."
        )
    return found.double()
