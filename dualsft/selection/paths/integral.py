"""The integral of both sums of M along a complete path, with the check that it is complete.

    φ_i = Σ_k <u_k, g_i(θ_k')>  →  l_i(θ_0) − l_i(θ_K)        φ_j = Σ_k (u_k)_j Σ_i g_ij(θ_k')

The falls of the losses come from passes without gradients at both ends. The path is cut into more pieces until the rows
are near them; `dualsft.matrix.quadrature` says where.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from dualsft.data.layout import Batch
from dualsft.errors import UserError
from dualsft.matrix import quadrature
from dualsft.matrix.example_values import ExampleIds, ExampleValues, ids_without
from dualsft.matrix.passes import compute_dtype
from dualsft.matrix.quadrature import Point
from dualsft.matrix.sketches import LOSS, Measurement
from dualsft.models import PreTrainedModel
from dualsft.runs.folder import RunFolder
from dualsft.runs.progress import PhaseLog
from dualsft.selection.directions import ColumnTotals
from dualsft.selection.held_direction import HeldDirection, masked
from dualsft.selection.passes import Passes
from dualsft.selection.paths.completeness import Completeness, completeness
from dualsft.selection.paths.totals import PathTotals
from dualsft.selection.paths.walk import RecordedPath
from dualsft.selection.scoring import sum_identity
from dualsft.selection.settings import SelectionSettings
from dualsft.sharding.collectives import sum_of_shards


@dataclass(frozen=True)
class Side:
    """Examples whose losses are integrated.

    Attributes:
        name: Their name in the log.
        loader: (ids, start, batch_tokens, part) -> batches of these examples, see `Loader`.
        ids: Those that have labels.
    """

    name: str
    loader: Callable[[ExampleIds, int, int, slice], Iterable[Batch]]
    ids: ExampleIds


@dataclass(frozen=True)
class Falls:
    """The falls of examples' losses from one end of a path to the other.

    Attributes:
        start: Example id -> l_i(θ_0).
        fall: Example id -> l_i(θ_0) − l_i(θ_K).
        nonfinite: Ids of the examples whose loss is not finite at an end; they are in neither.
    """

    start: ExampleValues
    fall: ExampleValues
    nonfinite: set[int]


@dataclass
class Integral:
    """Both sums along a path.

    Attributes:
        rows: Example id -> φ_i.
        tokens: Example id -> the contributions of its tokens, if they are kept.
        columns: Parameter name -> φ_j, on the host; empty unless asked for.
        completeness: How near they are to the falls; None for a part of the weights, whose falls are unknown.
        identity: Both sides of Σ_i φ_i = Σ_j φ_j, if there are columns.
    """

    rows: ExampleValues
    tokens: dict[int, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    completeness: Completeness | None = None
    identity: dict[str, float] | None = None


class PathIntegrator:
    """Integrates along one complete path.

    Args:
        model: Any point of the path; it is moved.
        settings: The quadrature, its tolerance, and whether contributions by token are kept.
        passes: Runs the passes.
        run: Keeps the sums.
        log: Records the cost of sums that an earlier run kept.
        path: The path.
        title: Its name in the log.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: SelectionSettings,
        passes: Passes,
        run: RunFolder,
        log: PhaseLog,
        path: RecordedPath,
        title: str,
    ) -> None:
        self._model, self._settings, self._passes, self._run, self._log = model, settings, passes, run, log
        self._path, self._title, self._reached = path, title, 0

    def losses(self, side: Side, point: int) -> tuple[ExampleValues, set[int]]:
        """l_i of a side's examples at a point of the path, without gradients; and the ids of those not finite there."""
        name = f"{side.name} loss at point {point} of the {self._title}"
        if (found := self._passes.finished(name)) is None:
            self._path.move(self._model, point)
            loader, measurement = partial(side.loader, side.ids), Measurement((LOSS,))
            found = self._passes.run(name, len(side.ids), loader, columns=False, measurement=measurement)
        return ExampleValues.of(found.measured.get(LOSS, {})), found.nonfinite

    def falls(self, side: Side) -> Falls:
        """How far the loss of each of a side's examples falls along the path."""
        (first, bad), (last, worse) = self.losses(side, 0), self.losses(side, self._path.pieces)
        start = first.where(last.has(first.ids))
        return Falls(start, ExampleValues(start.ids, start.numbers - last.at(start.ids)), bad | worse)

    def over(
        self,
        side: Side,
        fall: ExampleValues,
        columns: bool,
        mask: Mapping[str, Tensor] | None = None,
        occasion: str = "",
    ) -> tuple[Integral, set[int]]:
        """Integrate over the examples whose falls are given.

        Args:
            side: Where the examples are from.
            fall: Example id -> the fall of its loss.
            columns: Whether to sum over the examples for each weight too.
            mask: The weights that count; None for all, whose rows are compared with the falls.
            occasion: Suffix that tells the names of passes from earlier ones'.

        Returns:
            The integral, and the ids of the examples that it is without, as they are not finite somewhere on the path.
        """
        bad: set[int] = set()
        given = side.ids[fall.has(side.ids)]
        while True:
            if not len(ids := ids_without(given, bad)):
                raise UserError(f"No {side.name} example is finite all along the path; check data and weights.")
            by_chosen = ", by the chosen weights" if mask is not None else ""
            again = f"{by_chosen}{occasion}{f', without {len(bad)}' if bad else ''}"
            totals = self._totals(side, ids, fall, columns, mask, again)
            if isinstance(totals, PathTotals):
                return self._integral(totals, fall, mask), bad
            bad |= totals

    def _totals(
        self,
        side: Side,
        ids: ExampleIds,
        fall: ExampleValues,
        columns: bool,
        mask: Mapping[str, Tensor] | None,
        occasion: str,
    ) -> PathTotals | set[int]:
        """The sums over enough pieces; or the ids of examples that are not finite at some point."""
        key = f"integral-{side.name}-{self._title}{occasion}".replace(" ", "-").replace(",", "")
        totals = PathTotals.load(self._run, key, self._log) or PathTotals()
        while True:
            level = self._level(totals.level)
            for point in level.points[totals.points :]:
                name = f"{side.name} at {point.position:.6g} of {self._path.pieces} of the {self._title}{occasion}"
                if totals.points == 0:
                    totals.scale(level.kept)
                if bad := self._add(totals, name, side, ids, point, columns, mask):
                    self._run.drop(key)
                    return bad
                totals.save(self._run, key)
                self._passes.forget(name)
            if mask is None:
                self._reached = totals.level
            near = totals.level >= self._reached if mask is not None else self._completeness(totals, fall).reached
            if near or self._level(totals.level + 1).parts * self._path.pieces > self._settings.path.most_pieces:
                return totals
            totals.level, totals.points = totals.level + 1, 0

    def _level(self, number: int) -> quadrature.Level:
        return quadrature.level(self._settings.path.quadrature, self._path.pieces, number)

    def _add(
        self,
        totals: PathTotals,
        name: str,
        side: Side,
        ids: ExampleIds,
        point: Point,
        columns: bool,
        mask: Mapping[str, Tensor] | None,
    ) -> set[int]:
        """Add what the pass over some examples at a point gives; the ids that are not finite there, if there are any.

        Direction and sums of the point are gone when those of the next one come.
        """
        self._path.move(self._model, point.position)
        moved = self._path.displacement(self._model, point.shares)
        u = HeldDirection(moved if mask is None else masked(moved, mask, self._model), self._model)
        options = {"columns": columns, "by_token": self._settings.token_scores}
        found = self._passes.run(name, len(ids), partial(side.loader, ids), directions=[u.held], **options)
        if not found.nonfinite:
            totals.add(found, [u.exact], self._log.latest())
        return found.nonfinite

    def _integral(self, totals: PathTotals, fall: ExampleValues, mask: Mapping[str, Tensor] | None) -> Integral:
        rows, columns = totals.rows[0], totals.columns[0] if totals.columns else {}
        identity = sum_identity(rows, _column_totals(columns), compute_dtype(self._model)) if columns else None
        done = self._completeness(totals, fall) if mask is None else None
        return Integral(rows, totals.tokens[0] if totals.tokens else {}, columns, done, identity)

    def _completeness(self, totals: PathTotals, fall: ExampleValues) -> Completeness:
        column_sum = _column_totals(totals.columns[0]).total if totals.columns else None
        pieces = self._level(totals.level).parts * self._path.pieces
        return completeness(totals.rows[0], fall, column_sum, pieces, self._settings.path.tolerance)


def _column_totals(columns: Mapping[str, Tensor]) -> ColumnTotals:
    """Σ_j φ_j and Σ_j |φ_j| over all ranks."""
    wide = [column.double() for column in columns.values()]
    sums = [math.fsum(float(c.sum()) for c in wide), math.fsum(float(c.abs().sum()) for c in wide)]
    return ColumnTotals(*sum_of_shards(torch.tensor(sums, dtype=torch.float64)).tolist())
